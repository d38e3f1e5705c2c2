"""Measure how fast a package runs on this machine: medians of several runs, and their spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from llama_onnx.runtime.llama.generation import GenerationStats
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.runtime.memory import resident_bytes
from llama_onnx.targets.engines import ENGINES, EngineName
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.provider import Provider

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 512, 64, 5


@dataclass(frozen=True)
class Spread:
    """The median and the extremes of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of `values`, at least one number."""
        measured = list(values)
        return cls(median(measured), min(measured), max(measured))


@dataclass(frozen=True)
class Bench:
    """What was measured, and how.

    `prefill_rate` and `decode_rate` are in tokens per second, `first_token_seconds` is the time
    from the prompt to the first token. `load_seconds` is the time of a single load; it depends on
    how much of the files the system has cached. `resident` and `peak` are the bytes of memory that
    this process uses after loading and at most, mapped files included; None where the system does
    not report them.
    """

    package: str
    precision: str
    provider: dict[str, Any]
    engine: EngineName
    threads: int | None
    prompt_tokens: int
    new_tokens: int
    repeats: int
    load_seconds: float
    first_token_seconds: Spread
    prefill_rate: Spread
    decode_rate: Spread | None
    resident: int | None
    peak: int | None

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)


def bench(
    package: Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repeats: int = REPEATS,
    threads: int | None = None,
    provider: Provider | None = None,
    allow_fallback: bool = False,
    engine: EngineName = ENGINES[0],
    progress: Progress = SILENT,
) -> Bench:
    """Measure the package at `package` in `engine`, after one warm-up run.

    `prompt_tokens` and `new_tokens` default to `PROMPT_TOKENS` and `NEW_TOKENS`, or to fewer if
    the context is short. Raises what `Llama.load` raises, and `UsageError` for numbers below 1 or
    more tokens than the context holds.
    """
    numbers = {"repeats": repeats, "prompt tokens": prompt_tokens, "new tokens": new_tokens}
    for what, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"the number of {what} must be at least 1, not {number}.")
    progress.step("loading")
    started = perf_counter()
    model = Llama.load(
        package, threads=threads, provider=provider, allow_fallback=allow_fallback, engine=engine
    )
    loaded, memory = perf_counter() - started, resident_bytes()
    prompt = make_prompt(_fit(prompt_tokens, PROMPT_TOKENS, model.context_length // 2), model)
    count = _fit(new_tokens, NEW_TOKENS, model.context_length // 4)
    progress.step("warming up")
    model.measure(prompt, count)
    runs = []
    for number in range(repeats):
        progress.update("measuring", number, repeats)
        runs.append(model.measure(prompt, count))
    peak = resident_bytes()
    return Bench(
        package=str(package),
        precision=model.package.precision,
        provider=model.opened.to_json(),
        engine=engine,
        threads=threads,
        prompt_tokens=len(prompt),
        new_tokens=count,
        repeats=repeats,
        load_seconds=loaded,
        **_spreads(runs),
        resident=memory[0] if memory else None,
        peak=peak[1] if peak else None,
    )


def make_prompt(length: int, model: Llama) -> Tokens:
    """Return `length` random ids: the cost of a step does not depend on them."""
    return np.random.default_rng(0).integers(0, model.vocab_size, length, dtype=np.int32)


def _fit(given: int | None, default: int, room: int) -> int:
    return min(default, room) if given is None else given


def _spreads(runs: Sequence[GenerationStats]) -> dict[str, Any]:
    decoded = [run.decode_rate for run in runs if run.decode_rate]
    return {
        "first_token_seconds": Spread.of(run.first_token_seconds for run in runs),
        "prefill_rate": Spread.of(run.prefill_rate or 0.0 for run in runs),
        "decode_rate": Spread.of(decoded) if decoded else None,
    }
