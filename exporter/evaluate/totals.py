"""Sums over passages that add up exactly: shards in any order give the figures of one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_onnx.runtime.measure.evaluated import Estimate, Figures

MEANS = ("kl", "same_top1", "original_nats", "package_nats", "surprise")
"""What is summed: KL and agreement at every position; the negative log-probability of the next
token, by both models, and their difference, where there is one."""


@dataclass(frozen=True)
class ExactSum:
    """A sum of floats without any rounding, as floats that do not overlap (Shewchuk).

    >>> ExactSum().plus([1e100, 1.0, -1e100]).value
    1.0
    """

    parts: tuple[float, ...] = ()

    def plus(self, values: Iterable[float]) -> ExactSum:
        """Return the sum of this and finite `values`."""
        parts = list(self.parts)
        for value in values:
            kept = []
            for part in parts:
                large, small = (value, part) if abs(value) > abs(part) else (part, value)
                value = large + small
                if rest := small - (value - large):
                    kept.append(rest)
            parts = [*kept, value]
        return ExactSum(tuple(parts))

    @property
    def value(self) -> float:
        """The sum, rounded once."""
        return math.fsum(self.parts)


@dataclass(frozen=True)
class Passage:
    """What was measured in one passage: the `sums` of each of `MEANS`, and over how many positions;
    `predicted` of them have a next token."""

    positions: int
    predicted: int
    sums: Mapping[str, float]
    max_kl: float

    def count(self, name: str) -> int:
        """Return the number of values in a sum."""
        return self.positions if name in ("kl", "same_top1") else self.predicted


@dataclass(frozen=True)
class Totals:
    """Everything about some passages that their figures need.

    For each of `MEANS`: the number of values, its square summed over passages, and the sums over
    passages of s, s * s and s * n, where s is a passage's sum of n values.
    """

    passages: int = 0
    positions: int = 0
    max_kl: float = 0.0
    counts: Mapping[str, int] = field(default_factory=dict)
    squares: Mapping[str, int] = field(default_factory=dict)
    sums: Mapping[str, ExactSum] = field(default_factory=dict)

    @classmethod
    def of(cls, passages: Iterable[Passage]) -> Totals:
        """Return the totals of `passages`."""
        found = cls()
        for passage in passages:
            found = found.plus(_single(passage))
        return found

    def plus(self, other: Totals) -> Totals:
        """Return the totals of both; in whatever order, the same."""

        def added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
            return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}

        return Totals(
            self.passages + other.passages,
            self.positions + other.positions,
            max(self.max_kl, other.max_kl),
            added(self.counts, other.counts),
            added(self.squares, other.squares),
            {
                name: self.sums.get(name, ExactSum()).plus(other.sums.get(name, ExactSum()).parts)
                for name in {**self.sums, **other.sums}
            },
        )

    def estimate(self, name: str) -> Estimate:
        """Return the mean of `name` and its 95 % confidence interval.

        The tokens of a passage are not independent, so the passages are the sample: the mean is a
        ratio of two sums over passages, whose variance the delta method gives.
        """
        count, passages = self.counts[name], self.passages
        mean = self.sums[name].value / count
        if passages < 2:
            return Estimate(mean, math.nan, math.nan)
        # The sum of (s - mean * n) ** 2, in which large parts cancel: exactly, up to the end.
        spread = math.fsum(
            (
                *self.sums[f"{name} squared"].parts,
                *(-2 * mean * part for part in self.sums[f"{name} counted"].parts),
                mean * mean * self.squares[name],
            )
        )
        error = math.sqrt(max(0.0, spread) * passages / (passages - 1)) / count
        return Estimate.normal(mean, error)

    def figures(self) -> Figures:
        """Return the figures; there is at least one passage."""
        return Figures(
            positions=self.positions,
            passages=self.passages,
            mean_kl=self.estimate("kl"),
            max_kl=self.max_kl,
            same_top1=self.estimate("same_top1"),
            perplexity=self.estimate("package_nats").exp(),
            original_perplexity=self.estimate("original_nats").exp(),
            perplexity_ratio=self.estimate("surprise").exp(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything; no bit is lost."""
        return {
            "passages": self.passages,
            "positions": self.positions,
            "max_kl": self.max_kl,
            "counts": dict(self.counts),
            "squares": dict(self.squares),
            "sums": {name: list(found.parts) for name, found in self.sums.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Totals:
        """Read what `to_json` returned."""
        sums = {name: ExactSum(tuple(parts)) for name, parts in values["sums"].items()}
        return cls(**{**values, "sums": sums})


def _single(passage: Passage) -> Totals:
    counts = {name: passage.count(name) for name in MEANS}
    sums = {}
    for name in MEANS:
        total, count = passage.sums[name], counts[name]
        sums[name] = ExactSum((total,))
        sums[f"{name} squared"] = ExactSum((total * total,))
        sums[f"{name} counted"] = ExactSum((total * count,))
    squares = {name: count * count for name, count in counts.items()}
    return Totals(1, passage.positions, passage.max_kl, counts, squares, sums)
