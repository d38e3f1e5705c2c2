"""What was measured, as data: single runs, and their medians, extremes and percentiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True)
class SingleRun:
    """One answer alone: the time to read its prompt, and that of each token."""

    prompt_tokens: int
    prefill_seconds: float
    step_seconds: tuple[float, ...]

    @property
    def first_token_seconds(self) -> float:
        """The time from the prompt to the first token."""
        return self.prefill_seconds + sum(self.step_seconds[:1])

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def gaps(self) -> tuple[float, ...]:
        """The time from each token to the next."""
        return self.step_seconds[1:]

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None if there are none."""
        return len(self.gaps) / sum(self.gaps) if sum(self.gaps) > 0 else None


@dataclass(frozen=True)
class StreamsRun:
    """Several answers at once, while all of them were generated.

    `rate` is the tokens per second of all streams together, `together` the tokens that the stream
    with the fewest generated meanwhile, `cache_bytes` the most that buffers for caches took.
    """

    streams: int
    rate: float
    together: int
    gaps: tuple[float, ...]
    cache_bytes: int


@dataclass(frozen=True)
class TurnRun:
    """One turn of a chat: of its prompt, `reused_tokens` were known."""

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    first_token_seconds: float


@dataclass(frozen=True)
class Runs:
    """All runs of one package, in their order: one item for each repetition."""

    single: tuple[SingleRun, ...]
    streams: tuple[tuple[StreamsRun, ...], ...]
    turns: tuple[tuple[TurnRun, ...], ...]


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
class Gaps:
    """Percentiles of the time from one token to the next, over the `count` gaps of all runs."""

    count: int
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Gaps:
        """Return the percentiles of `values`, at least one number, as NumPy interpolates them."""
        p50, p99 = np.percentile(values, [50, 99])
        return cls(len(values), float(p50), float(p99))


@dataclass(frozen=True)
class Streams:
    """Decoding of several answers at once.

    `rate` is the tokens per second of all streams together, `ratio` the same relative to one stream
    of the same repetition. `together` is the fewest tokens of a stream that count.
    """

    streams: int
    rate: Spread
    ratio: Spread
    inter_token_seconds: Gaps
    together: int
    cache_bytes: int


@dataclass(frozen=True)
class Turn:
    """A turn of a chat; tokens are those of the last repetition."""

    turn: int
    prompt_tokens: int
    reused_tokens: int
    first_token_seconds: Spread


@dataclass(frozen=True)
class Caches:
    """Bytes of one position of one sequence, the most that caches may take, and what was kept of
    earlier texts at the end."""

    position_bytes: int
    most_bytes: int
    kept_bytes: int


def gather_streams(runs: Runs) -> tuple[Streams, ...]:
    """Return a summary for each number of streams."""
    found = []
    for column in zip(*runs.streams, strict=True):
        ones = [repetition[0].rate for repetition in runs.streams]
        found.append(
            Streams(
                column[0].streams,
                Spread.of(run.rate for run in column),
                Spread.of(run.rate / one for run, one in zip(column, ones, strict=True)),
                Gaps.of([gap for run in column for gap in run.gaps]),
                min(run.together for run in column),
                max(run.cache_bytes for run in column),
            )
        )
    return tuple(found)


def gather_turns(runs: Runs) -> tuple[Turn, ...]:
    """Return a summary for each turn that every repetition has."""
    return tuple(
        Turn(
            number,
            column[-1].prompt_tokens,
            column[-1].reused_tokens,
            Spread.of(run.first_token_seconds for run in column),
        )
        for number, column in enumerate(zip(*runs.turns, strict=False), 1)
    )
