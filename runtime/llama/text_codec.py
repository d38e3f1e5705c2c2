"""Between texts and tokens: a package's tokenizer, its chat template, and guides of an answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_onnx.runtime.llama.conversation import Message, check_messages
from llama_onnx.runtime.llama.no_tokenizer import NoTokenizer
from llama_onnx.runtime.llama.prompt import Tokens, check_text_length, check_tokens
from llama_onnx.runtime.llama.template import render_messages
from llama_onnx.runtime.llama.tools import Tool, check_tools
from llama_onnx.runtime.tokenizer.encoder import Encoder
from llama_onnx.runtime.tokenizer.text_stream import Decoder, TextStream
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage

if TYPE_CHECKING:
    from llama_onnx.runtime.engine.sampling.guidance import CompiledGuide, Guidance, Guide

_MOST_GUIDES = 16
"""Compiled guides that are kept: most callers send the same schema each time."""


class TextCodec:
    """What an open package makes of texts, for many callers at once.

    Attributes:
        rows: Rows of the embedding.
        context_length: The most tokens of a prompt and its answer.
        end_tokens: The tokens that end an answer.
    """

    def __init__(
        self,
        package: ModelPackage,
        settings: Mapping[str, Any],
        context_length: int,
        encoder: Encoder | NoTokenizer,
        decoder: Decoder | NoTokenizer,
    ) -> None:
        """Put together what was read; `settings` is the `model` part of genai_config.json."""
        self.package, self.context_length = package, context_length
        self.rows = int(settings["vocab_size"])
        self._encoder, self._decoder = encoder, decoder
        self._bos_token: int | None = settings.get("bos_token_id")
        self.end_tokens = frozenset(int(token) for token in self._decoder.eos_token_ids)
        self._lock = Lock()
        self._guidance: Guidance | None = None
        self._guides: dict[Guide, CompiledGuide] = {}

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the tokenizer; see `Llama.vocab_size`."""
        return self._encoder.get_vocab_size()

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a plain text; see `Llama.encode`."""
        tokens = self._encode(text, special_tokens=False)
        if len(tokens) and tokens[0] == self._bos_token:
            return tokens
        return self._encode(text, special_tokens=True)

    def encode_prompt(self, prompt: str | Tokens | Iterable[int]) -> Tokens:
        """Return the tokens of a text to continue, which may be token ids already.

        Raises `UsageError` for anything else, and for what `encode` refuses.
        """
        if isinstance(prompt, str):
            return self.encode(prompt)
        if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
            kind = type(prompt).__name__
            raise UsageError(f"the prompt must be a text or token ids, not {kind}.")
        return check_tokens(prompt, self.rows)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> Tokens:
        """Return the tokens of a conversation; see `Llama.encode_chat`."""
        self.package.require_tokenizer()
        text = render_messages(
            self.package.path,
            check_messages(messages),
            check_tools(tools),
            variables,
            continue_last=continue_last,
        )
        # The template writes the special tokens itself, the start token included.
        return self._encode(text, special_tokens=False)

    def _encode(self, text: str, *, special_tokens: bool) -> Tokens:
        if not isinstance(text, str):
            raise UsageError(f"the prompt must be a text, not {type(text).__name__}.")
        # Not genai's own tokenizer: with SentencePiece vocabularies, such as Llama 2's, 0.18 splits
        # runs of spaces and digits differently from the tokenizer the model was trained with.
        encode = self._encoder.encode
        try:
            check_text_length(
                text,
                self.context_length,
                lambda part: len(encode([part], add_special_tokens=False)[0]),
            )
            (ids,) = encode([text], add_special_tokens=special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise UsageError("the text has bytes that are not UTF-8: convert it first.") from None
        return np.asarray(ids, dtype=np.int32)

    def stream(self, *, answer: bool = False) -> TextStream:
        """Return what decodes tokens one by one, which continue a text or are an `answer`."""
        stream = self._decoder.create_stream()
        # An answer starts a new text. After a special token the stream drops the space that
        # SentencePiece puts before the first word of a text.
        for token in list(self.end_tokens)[:1] if answer else ():
            stream.decode(token)
        return stream

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, its name for a special one."""
        found: bytes = self._open_guidance().token_bytes(token)
        return found

    def compile(self, guide: Guide) -> CompiledGuide:
        """Return a guide that is ready to start answers.

        Raises `UsageError` for a guide that cannot be used, or a package that takes token ids only.
        """
        guidance = self._open_guidance()
        with self._lock:
            found = self._guides.pop(guide, None)
        if found is None:
            found = guidance.compile(guide)
        with self._lock:
            self._guides[guide] = found  # the latest at the end
            while len(self._guides) > _MOST_GUIDES:
                del self._guides[next(iter(self._guides))]
        return found

    def _open_guidance(self) -> Guidance:
        from llama_onnx.runtime.engine.sampling.guidance import open_guidance

        self.package.require_tokenizer()
        with self._lock:
            if self._guidance is None:
                self._guidance = open_guidance(self.package.path, self.rows, self.end_tokens)
            return self._guidance
