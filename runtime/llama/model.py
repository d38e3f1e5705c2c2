"""An opened package: text in, text out.

model = Llama.load("llama-2-7b-chat-int4")
answer = model.chat([{"role": "user", "content": "Name three primary colors."}])
for piece in answer:
    print(piece, end="", flush=True)
print(answer.stats)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_onnx.runtime.llama.generation import Generation, GenerationStats, Tokens
from llama_onnx.runtime.llama.no_tokenizer import NoTokenizer
from llama_onnx.runtime.llama.sampling import PACKAGE_DEFAULT, Sampling
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import get_provider
from llama_onnx.targets.registry import get_target

# Modules that need an extra are imported where they are used, so that `help(Llama)` needs none.
if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llama_onnx.runtime.placement.genai_model import OpenModel

Message = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""


class Llama:
    """A model ready to generate; make one with `Llama.load`.

    Examples:
        >>> model = llama_onnx.Llama.load("tiny-int4")
        >>> answer = model.generate("the quick brown fox", max_new_tokens=8)
        >>> text = "".join(answer)  # or print each piece as it comes
        >>> answer.stats.prompt_tokens, answer.stats.new_tokens
        (11, 8)
    """

    def __init__(
        self, package: ModelPackage, opened: OpenModel, context_length: int, bos_token: int | None
    ) -> None:
        from llama_onnx.runtime.genai import og
        from llama_onnx.runtime.llama.adapters import Adapters

        self.package = package
        self.context_length = context_length
        self.opened = opened
        self._model = opened.model
        self._adapters = Adapters(package, opened.model)
        if package.has_tokenizer:
            self._tokenizer: Any = og.Tokenizer(opened.model)
            self._encoder: Tokenizer | NoTokenizer = _read_encoder(package.path)
        else:
            self._tokenizer = self._encoder = NoTokenizer(package, _read_settings(package.path))
        self._bos_token = bos_token
        self._end_tokens = frozenset(int(token) for token in self._tokenizer.eos_token_ids)

    def __str__(self) -> str:
        """Return the package's name, its precision and its provider."""
        provider = self.opened.provider.ort_name
        return f"{self.package.path.resolve().name} · {self.package.precision} · {provider}"

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        max_length: int | None = None,
        threads: int | None = None,
        provider: Provider | str | None = None,
        allow_fallback: bool = False,
    ) -> Llama:
        """Open the package at `path`, on `provider` ("cpu", "cuda", ...) instead of its target's.

        `max_length` limits the context to fewer tokens than the model supports. If the provider
        cannot run, `allow_fallback` uses the CPU instead, and `opened.fallback` says why. Raises
        `PackageError`, `ProviderError` or `UsageError`.
        """
        from llama_onnx.runtime.placement.genai_model import open_model

        if isinstance(provider, str):
            provider = get_provider(provider)
        package = ModelPackage.open(Path(path))
        settings = _read_settings(package.path)
        context_length = int(settings["context_length"])
        if max_length is not None:
            if max_length < 2:
                raise UsageError(f"the context must hold at least 2 tokens, not {max_length}.")
            context_length = min(context_length, max_length)
        opened = open_model(
            package.path,
            provider or get_target(package.target).session.provider,
            threads=threads,
            allow_fallback=allow_fallback,
        )
        try:
            return cls(package, opened, context_length, settings.get("bos_token_id"))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PackageError(
                f"onnxruntime-genai cannot read {package.path}'s tokenizer: {reason}"
            ) from None

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = PACKAGE_DEFAULT,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Generation:
        """Continue `prompt` by at most `max_new_tokens`.

        `sampling` says how to choose tokens; `temperature`, `top_k`, `top_p` and `seed` override
        its fields. If a field is None the package decides; it is greedy by default. The answer
        ends before any text in `stop`. `adapter` names one of `package.adapters`, used for this
        answer only. The model runs when the first piece is requested. Raises `UsageError` for a
        value out of range, a prompt longer than the context, or an unknown adapter.
        """
        sampling = sampling.override(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        stream = self._tokenizer.create_stream()
        search = sampling.search_options()
        return self._start(self.encode(prompt), stream, max_new_tokens, search, stop, adapter)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = PACKAGE_DEFAULT,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Generation:
        """Answer the last of `messages`, formatted by the model's chat template.

        The other arguments and errors are those of `generate`.
        """
        self.package.require_tokenizer()
        sampling = sampling.override(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        stream = self._tokenizer.create_stream()
        # An answer starts a new text. After a special token the stream drops the space that
        # SentencePiece puts before the first word of a text.
        for token in list(self._end_tokens)[:1]:
            stream.decode(token)
        prompt = self.encode_chat(messages)
        search = sampling.search_options()
        return self._start(prompt, stream, max_new_tokens, search, stop, adapter)

    def measure(self, prompt: Tokens, new_tokens: int) -> GenerationStats:
        """Continue `prompt` greedily by exactly `new_tokens`, end tokens ignored, and time it.

        Raises `UsageError` if the context cannot hold both.
        """
        length = total_length(len(prompt), new_tokens, self.context_length)
        if length < len(prompt) + new_tokens:
            raise UsageError(
                f"a prompt of {len(prompt):,} and {new_tokens:,} new tokens are more than the "
                f"context of {self.context_length:,} tokens can hold: ask for fewer."
            )
        search = {"do_sample": False, "min_length": length}
        answer = self._start(
            prompt, self._tokenizer.create_stream(), new_tokens, search, (), adapter=None
        )
        for _ in answer:
            pass
        return answer.stats

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the tokenizer, added tokens included."""
        return self._encoder.get_vocab_size()

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a plain text, with one start token if the model uses one."""
        tokens = self._encode(text, special_tokens=False)
        if len(tokens) and tokens[0] == self._bos_token:
            return tokens
        return self._encode(text, special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> Tokens:
        """Return the tokens of a conversation up to the start of the answer.

        Raises `UsageError` if the model has no chat template, or if the template rejects the
        messages.
        """
        self.package.require_tokenizer()
        # The template writes the special tokens itself, the start token included.
        return self._encode(self._apply_template(messages), special_tokens=False)

    def _encode(self, text: str, *, special_tokens: bool) -> Tokens:
        # Not genai's own tokenizer: with SentencePiece vocabularies, such as Llama 2's, 0.18 splits
        # runs of spaces and digits differently from the tokenizer the model was trained with.
        try:
            ids = self._encoder.encode(text, add_special_tokens=special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise UsageError("the text has bytes that are not UTF-8: convert it first.") from None
        return np.asarray(ids, dtype=np.int32)

    def _apply_template(self, messages: Sequence[Message]) -> str:
        if not _has_chat_template(self.package.path):
            raise UsageError(
                f"{self.package.path} has no chat template, so it is not a chat model: "
                "give it a plain prompt to continue."
            )
        conversation = json.dumps([dict(message) for message in messages])
        try:
            return str(self._tokenizer.apply_chat_template(conversation))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"the model's chat template rejects the messages: {reason}") from None

    def _start(
        self,
        prompt: Tokens,
        stream: Any,
        max_new_tokens: int,
        search: Mapping[str, bool | int | float],
        stop: Sequence[str],
        adapter: str | None,
    ) -> Generation:
        from llama_onnx.runtime.genai import og

        params = og.GeneratorParams(self._model)
        # genai allocates the KV cache for `max_length` tokens: no more than this answer can need.
        length = total_length(len(prompt), max_new_tokens, self.context_length)
        try:
            params.set_search_options(max_length=length, **search)
            generator = og.Generator(self._model, params)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PackageError(
                f"{self.package.path / 'genai_config.json'} has settings that "
                f"onnxruntime-genai rejects: {reason}"
            ) from None
        if adapter is not None:
            self._adapters.activate(generator, adapter)
        return Generation(generator, stream, prompt, self._end_tokens, stop)


def total_length(prompt_tokens: int, max_new_tokens: int, context_length: int) -> int:
    """Return the most tokens that prompt and answer can take together.

    Raises `UsageError` for an empty prompt, one that leaves no room, or no new tokens.
    """
    if max_new_tokens < 1:
        raise UsageError(f"the number of new tokens must be at least 1, not {max_new_tokens}.")
    if prompt_tokens == 0:
        raise UsageError("the prompt is empty, and this model has no start token: give it a text.")
    if prompt_tokens >= context_length:
        raise UsageError(
            f"the prompt has {prompt_tokens:,} tokens, but the context holds {context_length:,} "
            "and an answer needs room too: shorten the prompt."
        )
    return min(prompt_tokens + max_new_tokens, context_length)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "genai_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["model"]
        int(settings["context_length"])
    except (OSError, ValueError, KeyError, TypeError):
        raise PackageError(f"{file} is missing or damaged: it has no context length.") from None
    return dict(settings)


def _read_encoder(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        encoder = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise PackageError(f"{file} cannot be read: {error}.") from None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))
