"""An opened package: text in, text out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.engine.sampling.parameters import PACKAGE_DEFAULT, Sampling
from llama_onnx.runtime.llama.asking import (
    DEFAULT_NEW_TOKENS,
    AnswerOptions,
    ask_exactly,
    prepare,
    start,
)
from llama_onnx.runtime.llama.async_generation import AsyncGeneration
from llama_onnx.runtime.llama.backends import Backend, Opened
from llama_onnx.runtime.llama.conversation import Message
from llama_onnx.runtime.llama.conversing import Conversing
from llama_onnx.runtime.llama.generation import Generation
from llama_onnx.runtime.llama.generation_stats import GenerationStats
from llama_onnx.runtime.llama.opening import open_codec
from llama_onnx.runtime.llama.prompt import Tokens, check_tokens
from llama_onnx.runtime.llama.text_codec import TextCodec
from llama_onnx.runtime.llama.tools import Tool
from llama_onnx.targets.engines import SPECULATIONS, EngineName, SpeculationName
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.provider import Provider

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from llama_onnx.runtime.engine.engine import Limits
    from llama_onnx.runtime.engine.sampling.guidance import Guide


class Llama(Conversing):
    """An open package, ready to generate text. Use `Llama.load` to open one.

    Several threads may ask for answers at once. A `with` block or `close()` frees the model.

    Attributes:
        package: The package on disk.
        context_length: The most tokens that a prompt and its answer can take together.
        codec, backend: The tokenizer and the engine, for servers.
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
    codec: TextCodec
    backend: Backend

    def __init__(self, *_args: object, **_options: object) -> None:
        """Raise `TypeError`: `Llama.load` opens a package."""
        raise TypeError("Llama has no public constructor: use Llama.load(path).")

    def _attach(self, codec: TextCodec, backend: Backend) -> None:
        self.package, self.context_length = codec.package, codec.context_length
        self.opened = backend.opened
        self.codec, self.backend = codec, backend

    def __str__(self) -> str:
        """Return the package's name, its precision and its provider."""
        provider = self.opened.provider.ort_name
        return f"{self.package.path.resolve().name} · {self.package.precision} · {provider}"

    def __enter__(self) -> Llama:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model."""
        self.close()

    def close(self) -> None:
        """End all answers, which get an error, and free the model; with "genai", do nothing."""
        self.backend.close()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        max_length: int | None = None,
        threads: int | None = None,
        provider: Provider | str | None = None,
        allow_fallback: bool = False,
        engine: EngineName | None = None,
        limits: Limits | None = None,
        speculate: SpeculationName = SPECULATIONS[0],
        draft: str | os.PathLike[str] | None = None,
        tuned: bool = True,
    ) -> Llama:
        """Open a package and return the model.

        Args:
            path: The package's folder.
            max_length: Limit the context to this many tokens, at least 2, if it has more.
            threads: Threads for work on the CPU, at least 1. None: ONNX Runtime decides.
            provider: "cpu", "cuda", "directml" or "webgpu". None: the one of the package's target.
            allow_fallback: Use the CPU if the provider cannot run; `opened.fallback` then says why.
            engine: "onnxruntime" is our own, which remembers what it has read, answers several
                callers, and has all of `Sampling`; "genai" is onnxruntime-genai, one answer at a
                time. None: ours on the CPU, genai elsewhere.
            limits: Of our own engine's caches and callers. None: half of the free memory, 8.
            speculate: Draft tokens from what the text repeats and verify several in one step, while
                that is faster (our engine): "auto" where the graph can, "ngram" or an error, "off".
            draft: The folder of a smaller package with the same tokens, which drafts as well.
            tuned: Use what `llama-onnx tune` kept for the package on this machine (our engine).

        Raises:
            PackageError: The package is missing, incomplete or damaged.
            ProviderError: The provider cannot run here.
            UsageError: An argument is out of range or names nothing, or nothing verifies drafts.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4", provider="cpu", max_length=64)
            >>> str(model), model.context_length
            ('tiny-int4 · int4 · CPUExecutionProvider', 64)
        """
        codec, backend = open_codec(
            path,
            max_length=max_length,
            threads=threads,
            provider=provider,
            allow_fallback=allow_fallback,
            engine=engine,
            limits=limits,
            speculate=speculate,
            draft=draft,
            tuned=tuned,
        )
        model = cls.__new__(cls)
        model._attach(codec, backend)
        return model

    def generate(
        self,
        prompt: str | Tokens | Iterable[int],
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        sampling: Sampling = PACKAGE_DEFAULT,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        adapter: str | None = None,
        guide: Guide | None = None,
    ) -> Generation:
        """Continue a text.

        Args:
            prompt: The text to continue, or its token ids.
            max_new_tokens: The most tokens to generate, at least 1; the context limits them too.
            sampling: How to choose tokens. A field that is None leaves the choice to the package,
                which is greedy by default.
            temperature: Overrides `sampling.temperature`; 0 is greedy.
            top_k: Overrides `sampling.top_k`.
            top_p: Overrides `sampling.top_p`.
            seed: Overrides `sampling.seed`, up to 64 bits. Has no effect on greedy choices.
            stop: A text, or several, that ends the answer, which is cut before the first of them.
            adapter: One of `package.adapters`, used for this answer only.
            guide: What the answer must be: a JSON schema, a regular expression or a grammar.

        Returns:
            An iterator over pieces of text. The model runs when the first piece is requested.

        Raises:
            UsageError: A value is out of range, the prompt does not fit the context, the adapter
                is unknown, the guide cannot be used, or the package takes token ids only.
            PackageError: The package's tokenizer, adapter or search settings are damaged.
            ResourceError: There is not enough memory for the answer's cache.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> answer = model.generate("the fox", max_new_tokens=4, temperature=0.7, seed=1)
            >>> text = "".join(answer)
            >>> answer.stats.new_tokens, answer.stats.finish_reason
            (4, 'length')
        """
        return start(
            self.codec,
            self.backend,
            self.codec.encode_prompt(prompt),
            self.codec.stream(),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            adapter=adapter,
            guide=guide,
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_variables: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Generation:
        """Answer the last message of a conversation.

        Args:
            messages: The conversation, `{"role": ..., "content": ...}` each, formatted by the
                model's chat template. A content is a text, or a list of `{"type": "text", "text":
                ...}`, which are joined by line feeds.
            tools: See `encode_chat`, also for the two arguments that follow.
            template_variables: More variables of the template.
            continue_last: Go on with the last message, which must be the assistant's.
            **options: The keyword arguments of `generate`.

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
        prompt = self.codec.encode_chat(
            messages, tools=tools, variables=template_variables, continue_last=continue_last
        )
        stream = self.codec.stream(answer=not continue_last)
        return start(self.codec, self.backend, prompt, stream, **options)

    def agenerate(
        self, prompt: str | Tokens | Iterable[int], **options: Unpack[AnswerOptions]
    ) -> AsyncGeneration:
        """Continue a text, for asyncio: `generate` with an answer for `async for`.

        The prompt is encoded before this returns. Raises as `generate` does, and `UsageError` if
        genai generates.

        Examples:
            >>> import asyncio
            >>> async def answer(model):
            ...     return [piece async for piece in model.agenerate("the fox", max_new_tokens=4)]
            >>> with llama_onnx.Llama.load("tiny-int4") as model:
            ...     len("".join(asyncio.run(answer(model)))) > 0
            True
        """
        stream = self.codec.stream()
        return prepare(
            self.codec, self.backend, self.codec.encode_prompt(prompt), stream, **options
        )

    def achat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_variables: Mapping[str, Any] | None = None,
        continue_last: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> AsyncGeneration:
        """Answer the last message of a conversation, for asyncio; see `chat` and `agenerate`."""
        prompt = self.codec.encode_chat(
            messages, tools=tools, variables=template_variables, continue_last=continue_last
        )
        stream = self.codec.stream(answer=not continue_last)
        return prepare(self.codec, self.backend, prompt, stream, **options)

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
        asked = ask_exactly(self.codec, prompt, new_tokens)
        run = self.backend.start(asked)
        answer = Generation.of(run, self.codec.stream(), (), length=asked.length)
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
        return self.codec.vocab_size

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
        return self.codec.encode(text)

    def decode(self, tokens: Tokens | Iterable[int]) -> str:
        """Return the text of tokens, without special tokens.

        Examples:
            >>> model = llama_onnx.Llama.load("tiny-int4")
            >>> model.decode(model.encode("the fox"))
            'the fox'
        """
        stream = self.codec.stream()
        return "".join(stream.decode(int(token)) for token in check_tokens(tokens, self.codec.rows))

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        template_variables: Mapping[str, Any] | None = None,
        continue_last: bool = False,
    ) -> Tokens:
        """Return the tokens of a conversation up to the start of the answer.

        Args:
            messages: The conversation, `{"role": ..., "content": ...}` each.
            tools: Functions that the model may call, in OpenAI's form; `parse_tool_calls` of
                `runtime.llama.tools` reads the calls back.
            template_variables: More variables of the template, such as `{"enable_thinking": False}`
                of Qwen 3's.
            continue_last: The last message is the start of the answer, which goes on from there.

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
        return self.codec.encode_chat(
            messages, tools=tools, variables=template_variables, continue_last=continue_last
        )
