"""An opened package: text in, text out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_onnx.runtime.engine.sampling.parameters import PACKAGE_DEFAULT, Sampling, check_sampling
from llama_onnx.runtime.llama.backends import Asked, Backend, Opened, open_backend
from llama_onnx.runtime.llama.conversation import Message, check_messages
from llama_onnx.runtime.llama.generation import Generation, GenerationStats
from llama_onnx.runtime.llama.no_tokenizer import NoTokenizer
from llama_onnx.runtime.llama.prompt import (
    Tokens,
    check_length,
    check_text_length,
    check_tokens,
    total_length,
)
from llama_onnx.runtime.llama.stops import check_stops
from llama_onnx.runtime.llama.template import check_template, render_messages
from llama_onnx.runtime.llama.text_files import read_settings
from llama_onnx.runtime.llama.tools import Tool, check_tools
from llama_onnx.runtime.tokenizer.encoder import Encoder, open_encoder
from llama_onnx.targets.engines import ENGINES, EngineName, check_engine
from llama_onnx.targets.errors import PackageError, UsageError, describe_reason
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.printable import printable
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import get_provider
from llama_onnx.targets.registry import get_target


class Llama:
    """An open package, ready to generate text. Use `Llama.load` to open one.

    Attributes:
        package: The package on disk.
        context_length: The most tokens that a prompt and its answer can take together.
        opened: What runs the model: its `provider`, and as `fallback` the reason why that is not
            the requested one, or None.

    Examples:
        >>> model = llama_onnx.Llama.load("tiny-int4")
        >>> answer = model.generate("the quick brown fox", max_new_tokens=8)
        >>> text = "".join(answer)  # or print each piece as it comes
        >>> answer.stats.prompt_tokens, answer.stats.new_tokens
        (11, 8)
    """

    package: ModelPackage
    context_length: int
    opened: Opened

    def __init__(self, *_args: object, **_options: object) -> None:
        """Raise `TypeError`: `Llama.load` opens a package."""
        raise TypeError("Llama has no public constructor: use Llama.load(path).")

    def _attach(
        self,
        package: ModelPackage,
        backend: Backend,
        settings: dict[str, Any],
        context_length: int,
    ) -> None:
        self.package = package
        self.context_length = context_length
        self.opened = backend.opened
        self._backend = backend
        self._rows = int(settings["vocab_size"])
        if package.has_tokenizer:
            check_template(package.path)
            self._encoder: Encoder | NoTokenizer = open_encoder(package.path, self._rows)
            self._tokenizer: Any = backend.open_tokenizer()
        else:
            self._tokenizer = self._encoder = NoTokenizer(package, settings)
        self._bos_token: int | None = settings.get("bos_token_id")
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
        engine: EngineName = ENGINES[0],
    ) -> Llama:
        """Open a package.

        Args:
            path: The package's folder.
            max_length: Limit the context to fewer tokens, at least 2. A value above the package's
                own context has no effect.
            threads: Threads for work on the CPU, at least 1. None: ONNX Runtime decides.
            provider: "cpu", "cuda", "directml" or "webgpu". None: the one of the package's target.
            allow_fallback: Use the CPU if the provider cannot run here; `opened.fallback` then says
                why. Has no effect on the CPU itself.
            engine: What generates: "genai" is onnxruntime-genai, one answer at a time;
                "onnxruntime" is our own engine, which remembers what it has read, answers several
                callers at once, and takes the likeliest token only.

        Returns:
            The open model.

        Raises:
            PackageError: The package is missing, incomplete or damaged.
            ProviderError: The provider cannot run here.
            UsageError: An argument is out of range or names no provider or engine.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4", provider="cpu", max_length=64)
            >>> str(model), model.context_length
            ('tiny-int4 · int4 · CPUExecutionProvider', 64)
        """
        check_engine(engine)
        if provider is not None and not isinstance(provider, Provider):
            provider = get_provider(provider)
        package = ModelPackage.open(Path(path))
        settings = read_settings(package.path)
        context_length = int(settings["context_length"])
        if max_length is not None:
            context_length = min(context_length, check_length(max_length))
        backend = open_backend(
            engine,
            package,
            context_length,
            provider or get_target(package.target).session.provider,
            threads=threads,
            allow_fallback=allow_fallback,
        )
        model = cls.__new__(cls)
        try:
            model._attach(package, backend, settings, context_length)
        except RuntimeError as error:
            raise PackageError(
                f"onnxruntime-genai cannot open the tokenizer of {package.path}: "
                f"{printable(describe_reason(error))}."
            ) from None
        return model

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
        stop: str | Sequence[str] = (),
        adapter: str | None = None,
    ) -> Generation:
        """Continue a text.

        Args:
            prompt: The text to continue.
            max_new_tokens: The most tokens to generate, at least 1; the context limits them too.
            sampling: How to choose tokens. A field that is None leaves the choice to the package,
                which is greedy by default.
            temperature: Overrides `sampling.temperature`; 0 is greedy.
            top_k: Overrides `sampling.top_k`.
            top_p: Overrides `sampling.top_p`.
            seed: Overrides `sampling.seed`, up to 64 bits. Has no effect on greedy choices.
            stop: A text, or several, that ends the answer, which is cut before the first of them.
            adapter: One of `package.adapters`, used for this answer only.

        Returns:
            An iterator over pieces of text. The model runs when the first piece is requested.

        Raises:
            UsageError: A value is out of range, the prompt does not fit the context, the adapter
                is unknown, or the package takes token ids only.
            PackageError: The package's tokenizer, adapter or search settings are damaged.
            ResourceError: There is not enough memory for the answer's cache.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> answer = model.generate("the fox", max_new_tokens=4, temperature=0.7, seed=1)
            >>> text = "".join(answer)
            >>> answer.stats.new_tokens, answer.stats.finish_reason
            (4, 'length')
        """
        sampling = check_sampling(sampling).override(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        stream = self._tokenizer.create_stream()
        return self._start(self.encode(prompt), stream, max_new_tokens, sampling, stop, adapter)

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
        stop: str | Sequence[str] = (),
        adapter: str | None = None,
    ) -> Generation:
        """Answer the last message of a conversation.

        Args:
            messages: The conversation, `{"role": ..., "content": ...}` each, formatted by the
                model's chat template. A content is a text, or a list of `{"type": "text", "text":
                ...}`, which are joined by line feeds.
            max_new_tokens: See `generate`, also for all arguments that follow.

        Returns:
            An iterator over pieces of the answer's text; see `generate`.

        Raises:
            UsageError: As `encode_chat` and `generate`.
            PackageError: As `generate`.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> answer = model.chat([{"role": "user", "content": "the fox"}], max_new_tokens=4)
            >>> text = "".join(answer)
            >>> answer.stats.new_tokens
            4
        """
        self.package.require_tokenizer()
        sampling = check_sampling(sampling).override(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        stream = self._tokenizer.create_stream()
        # An answer starts a new text. After a special token the stream drops the space that
        # SentencePiece puts before the first word of a text.
        for token in list(self._end_tokens)[:1]:
            stream.decode(token)
        prompt = self.encode_chat(messages)
        return self._start(prompt, stream, max_new_tokens, sampling, stop, adapter)

    def measure(self, prompt: Tokens | Iterable[int], new_tokens: int) -> GenerationStats:
        """Continue a prompt greedily by an exact number of tokens, and time it.

        Args:
            prompt: Token ids: an array, or any iterable of whole numbers.
            new_tokens: Tokens to generate; end tokens do not end the answer.

        Returns:
            Token counts and times in seconds.

        Raises:
            UsageError: The prompt is empty or has what is not a token id, or the context cannot
                hold both.
            PackageError: The package's search settings are damaged.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> stats = model.measure(model.encode("the fox"), new_tokens=8)
            >>> stats.new_tokens
            8
        """
        prompt = check_tokens(prompt, self._rows)
        length = total_length(len(prompt), new_tokens, self.context_length)
        if length < len(prompt) + new_tokens:
            raise UsageError(
                f"a prompt of {len(prompt):,} and {new_tokens:,} new tokens are more than the "
                f"context of {self.context_length:,} tokens can hold: ask for fewer."
            )
        stream = self._tokenizer.create_stream()
        answer = self._start(
            prompt, stream, new_tokens, PACKAGE_DEFAULT, (), adapter=None, measured=True
        )
        for _ in answer:
            pass
        return answer.stats

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the tokenizer, added tokens included.

        Without a tokenizer, the number of rows of the embedding.

        Examples:
            >>> llama_onnx.Llama.load("tiny-int4").vocab_size
            288
        """
        return self._encoder.get_vocab_size()

    def encode(self, text: str) -> Tokens:
        """Return the tokens of a plain text, with one start token if the model uses one.

        Args:
            text: The text; special tokens written in it count as such.

        Returns:
            Token ids, int32 [tokens].

        Raises:
            UsageError: The text is not valid Unicode, or the package takes token ids only.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> model.encode("the fox")
            array([260, 223, 276,  90], dtype=int32)
        """
        tokens = self._encode(text, special_tokens=False)
        if len(tokens) and tokens[0] == self._bos_token:
            return tokens
        return self._encode(text, special_tokens=True)

    def encode_chat(self, messages: Sequence[Message], *, tools: Sequence[Tool] = ()) -> Tokens:
        """Return the tokens of a conversation up to the start of the answer.

        Args:
            messages: The conversation, `{"role": ..., "content": ...}` each.
            tools: Functions that the model may call, in OpenAI's form; `parse_tool_calls` of
                `runtime.llama.tools` reads the calls back.

        Returns:
            Token ids, int32 [tokens].

        Raises:
            UsageError: The messages are not a conversation, the model has no chat template, the
                template rejects the messages, or the package takes token ids only.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> tokens = model.encode_chat([{"role": "user", "content": "the fox"}])
            >>> tokens.shape, tokens.dtype
            ((23,), dtype('int32'))
        """
        self.package.require_tokenizer()
        # The template writes the special tokens itself, the start token included.
        text = render_messages(self.package.path, check_messages(messages), check_tools(tools))
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

    def _start(
        self,
        prompt: Tokens,
        stream: Any,
        max_new_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        adapter: str | None,
        *,
        measured: bool = False,
    ) -> Generation:
        stops = check_stops(stop)
        length = total_length(len(prompt), max_new_tokens, self.context_length)
        ends = frozenset[int]() if measured else self._end_tokens
        asked = Asked(prompt, self._rows, length, sampling, ends, adapter, measured)
        run = self._backend.start(asked)
        return Generation.of(run, stream, ends, stops, length=length)
