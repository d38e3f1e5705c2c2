"""Several answers of the engine at once, and what of it was really at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from llama_onnx.runtime.bench.figures import StreamsRun
from llama_onnx.runtime.engine.answer import Answer
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.events import PromptEvent, Request, TokenEvent
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.sampler import Sampler
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.targets.errors import LlamaOnnxError

SLACK = 8
"""Tokens that an answer may be ahead by, for each of the others, once all are generated."""


@dataclass
class Stream:
    """The moments at which the tokens of an answer were chosen, and the tokens."""

    asked: float
    moments: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reused: int = 0


def request(engine: Engine, prompt: Tokens, count: int) -> Request:
    """Return a request for exactly `count` tokens, greedily, that may use what was read before."""
    chooser = Sampler(Choice(), prompt.tolist(), engine.layout.vocab_size)
    return Request(prompt, count, chooser)


def follow(answer: Answer, asked: float, engine: Engine) -> tuple[Stream, int]:
    """Read an answer to its end; also return the most bytes that caches had meanwhile."""
    stream, most, now = Stream(asked), 0, asked
    for event in answer:
        most = max(most, engine.cache_bytes)
        if isinstance(event, PromptEvent):
            stream.reused, now = event.reused, now + event.seconds
        elif isinstance(event, TokenEvent):
            now += event.seconds
            stream.moments.append(now)
            stream.tokens.append(event.token)
    return stream, most


def run_streams(engine: Engine, prompts: Sequence[Tokens], new_tokens: int) -> StreamsRun:
    """Continue all `prompts` at once by `new_tokens` tokens or a few more.

    Each prompt has been read before, as far as the caches hold that: all answers begin at almost
    the same time, and what is measured is their steps.
    """
    for prompt in prompts:
        follow(engine.submit(request(engine, prompt, 1)), perf_counter(), engine)
    room = engine.context_length - max(map(len, prompts))
    count = min(new_tokens + SLACK * (len(prompts) - 1), room)
    requests = [request(engine, prompt, count) for prompt in prompts]
    answers = [(perf_counter(), engine.submit(one)) for one in requests]
    try:
        followed = [follow(answer, asked, engine) for asked, answer in answers]
    finally:
        for _, answer in answers:
            answer.cancel()
    return measure_overlap(
        [stream for stream, _ in followed], cache_bytes=max(most for _, most in followed)
    )


def measure_overlap(streams: Sequence[Stream], cache_bytes: int = 0) -> StreamsRun:
    """Return what happened between the last stream's first token and the first stream's last.

    Raises `LlamaOnnxError` if they were hardly together.
    """
    start = max(stream.moments[0] for stream in streams)
    end = min(stream.moments[-1] for stream in streams)
    gaps: list[float] = []
    rate, together = 0.0, len(streams[0].moments)
    for stream in streams:
        moments = [moment for moment in stream.moments if start <= moment <= end]
        if len(moments) < 2:
            raise LlamaOnnxError(
                f"{len(streams)} streams were not generated at the same time for long enough to "
                "measure them: pass more --new-tokens, fewer --prompt-tokens or fewer --streams."
            )
        # Each by its own clock, whose ticks are those of its own steps.
        rate += (len(moments) - 1) / (moments[-1] - moments[0])
        together = min(together, len(moments))
        gaps += np.diff(moments).tolist()
    return StreamsRun(len(streams), rate, together, tuple(gaps), cache_bytes)
