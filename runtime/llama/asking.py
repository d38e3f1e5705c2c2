"""The options that every way to ask for an answer has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from llama_onnx.runtime.engine.sampling.parameters import PACKAGE_DEFAULT, Sampling, check_sampling
from llama_onnx.runtime.llama.async_generation import AsyncGeneration
from llama_onnx.runtime.llama.backends import Asked, Backend
from llama_onnx.runtime.llama.generation import Generation
from llama_onnx.runtime.llama.prompt import Tokens, check_tokens, total_length
from llama_onnx.runtime.llama.stops import check_stops
from llama_onnx.runtime.llama.text_codec import TextCodec
from llama_onnx.targets.errors import UsageError

if TYPE_CHECKING:
    from llama_onnx.runtime.engine.sampling.guidance import Guide


DEFAULT_NEW_TOKENS = 256
"""The most tokens of an answer, unless its caller says otherwise."""


class TurnOptions(TypedDict, total=False):
    """The keyword arguments of `Llama.generate`, which explains them, but `adapter`."""

    max_new_tokens: int
    sampling: Sampling
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: str | Sequence[str]
    guide: Guide | None


class AnswerOptions(TurnOptions, total=False):
    """The keyword arguments of `Llama.generate`, which explains them."""

    adapter: str | None


def ask(
    codec: TextCodec,
    prompt: Tokens,
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    sampling: Sampling = PACKAGE_DEFAULT,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    adapter: str | None = None,
    guide: Guide | None = None,
    ignore_eos: bool = False,
) -> Asked:
    """Return what a backend needs to know; raises `UsageError` as `Llama.generate` does.

    `ignore_eos`: no token ends the answer, which becomes as long as it may.
    """
    chosen = check_sampling(sampling).override(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    return Asked(
        prompt,
        codec.rows,
        total_length(len(prompt), max_new_tokens, codec.context_length),
        chosen,
        frozenset() if ignore_eos else codec.end_tokens,
        adapter,
        guide=None if guide is None else codec.compile(guide),
    )


def start(
    codec: TextCodec,
    backend: Backend,
    prompt: Tokens,
    stream: Any,
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> Generation:
    """Return the answer to `prompt`, which has read nothing yet; raises as `Llama.generate` does.

    `stream` decodes its tokens.
    """
    stops = check_stops(stop)
    asked = ask(codec, prompt, **options)
    run = backend.start(asked)
    return Generation.of(run, stream, asked.end_tokens, stops, length=asked.length)


def prepare(
    codec: TextCodec,
    backend: Backend,
    prompt: Tokens,
    stream: Any,
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> AsyncGeneration:
    """Do the same for asyncio; raises as `Llama.agenerate` does."""
    stops = check_stops(stop)
    asked = ask(codec, prompt, **options)
    submit = backend.prepare(asked)
    return AsyncGeneration(submit, stream, asked.end_tokens, stops, len(prompt))


def ask_exactly(codec: TextCodec, prompt: Tokens | Iterable[int], new_tokens: int) -> Asked:
    """Return what a backend needs to know to measure so many tokens; see `Llama.measure`."""
    prompt = check_tokens(prompt, codec.rows)
    length = total_length(len(prompt), new_tokens, codec.context_length)
    if length < len(prompt) + new_tokens:
        raise UsageError(
            f"a prompt of {len(prompt):,} and {new_tokens:,} new tokens are more than the "
            f"context of {codec.context_length:,} tokens can hold: ask for fewer."
        )
    return Asked(prompt, codec.rows, length, PACKAGE_DEFAULT, frozenset(), measured=True)
