"""A stand-in for the tokenizer in a package without one, which accepts token ids only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from llama_onnx.targets.package import ModelPackage


class SilentStream:
    """Decodes every token to no text, so that steps can be measured."""

    def decode(self, token: int) -> str:
        """Return an empty text."""
        return ""

    def finish(self) -> str:
        """Return an empty text."""
        return ""


class NoTokenizer:
    """The methods of genai's tokenizer and of `Encoder` that `Llama` calls.

    `settings` is the `model` part of genai_config.json.
    """

    def __init__(self, package: ModelPackage, settings: Mapping[str, Any]) -> None:
        self._package = package
        ends = settings.get("eos_token_id", [])
        self.eos_token_ids = ends if isinstance(ends, list) else [ends]
        self._vocab_size = int(settings["vocab_size"])

    def get_vocab_size(self) -> int:
        """Return the number of rows of the embedding."""
        return self._vocab_size

    def create_stream(self) -> SilentStream:
        """Return a stream without text."""
        return SilentStream()

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> NoReturn:
        """Raise `UsageError`, as `ModelPackage.require_tokenizer` does."""
        self._package.require_tokenizer()
        raise AssertionError("a package with a tokenizer is not opened with this class")
