"""Several answers of the engine at once, and what of it was really at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from time import perf_counter

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.bench.timings import StreamsRun
from llama_onnx.runtime.engine.answer import Answer
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.events import PromptEvent, Request, TokenEvent
from llama_onnx.runtime.engine.failures import likeliest
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.sampler import Chosen, Sampler
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.targets.errors import LlamaOnnxError

SLACK = 8
"""Tokens that an answer may be ahead by, for each of the others, once all are generated."""


_ATTEMPTS = 5
"""A system that is busy may hold one answer up until others are over: then nothing was measured."""


class _Gate:
    """Chooses a token once it is opened; until then the engine does nothing else."""

    def __init__(self) -> None:
        self._opened = Event()

    def open(self) -> None:
        """Let the engine go on."""
        self._opened.set()

    def choose(self, logits: npt.NDArray[np.float32]) -> Chosen:
        """Wait, and return the likeliest token."""
        self._opened.wait()
        return Chosen(likeliest(logits, 0), None)


@dataclass
class Stream:
    """The moments at which the tokens of an answer were chosen, and the tokens."""

    asked: float
    moments: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    reused: int = 0


def request(engine: Engine, prompt: Tokens, count: int) -> Request:
    """Return a request for exactly `count` tokens, greedily, that may use what was read before.

    Without drafts: how often they are right depends on the text, and here it is random.
    """
    chooser = Sampler(Choice(), prompt.tolist(), engine.layout.vocab_size)
    return Request(prompt, count, chooser, speculate=False)


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
    for _ in range(_ATTEMPTS):
        followed = _follow_all(engine, [request(engine, prompt, count) for prompt in prompts])
        most = max(most for _, most in followed)
        found = measure_overlap([stream for stream, _ in followed], cache_bytes=most)
        if found is not None:
            return found
    raise LlamaOnnxError(
        f"{len(prompts)} streams were not generated at the same time for long enough to measure "
        "them: pass more --new-tokens, fewer --prompt-tokens or fewer --streams."
    )


def _follow_all(engine: Engine, requests: Sequence[Request]) -> list[tuple[Stream, int]]:
    """Ask for all answers before the engine starts the first, and read them to their end."""
    gate = _Gate()
    answers: list[Answer] = []
    try:
        answers.append(engine.submit(Request(requests[0].prompt[:1], 1, gate, reuse=False)))
        asked = [(perf_counter(), engine.submit(one)) for one in requests]
        answers += [answer for _, answer in asked]
        gate.open()
        return [follow(answer, moment, engine) for moment, answer in asked]
    finally:
        gate.open()
        for answer in answers:
            answer.cancel()


def measure_overlap(streams: Sequence[Stream], cache_bytes: int = 0) -> StreamsRun | None:
    """Return what happened between the last stream's first token and the first stream's last.

    None if they were hardly together.
    """
    start = max(stream.moments[0] for stream in streams)
    end = min(stream.moments[-1] for stream in streams)
    inside = [[m for m in stream.moments if start <= m <= end] for stream in streams]
    together = min(map(len, inside))
    if together < 2:
        return None
    # Each by its own clock, whose ticks are those of its own steps.
    rate = sum((len(moments) - 1) / (moments[-1] - moments[0]) for moments in inside)
    gaps = [gap for moments in inside for gap in np.diff(moments).tolist()]
    return StreamsRun(len(streams), rate, together, tuple(gaps), cache_bytes)
