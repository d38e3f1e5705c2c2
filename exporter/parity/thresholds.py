"""What a package must hold, as data: one row a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

EVERY = "every"


@dataclass(frozen=True)
class Threshold:
    """`metric` of measurement `measure` must be at most `limit` for packages of `precision`."""

    precision: str
    measure: str
    metric: str
    limit: float
    reason: str


@dataclass(frozen=True)
class Check:
    """A threshold held against what was measured."""

    threshold: Threshold
    value: float

    @property
    def passed(self) -> bool:
        """Whether the limit holds; a NaN never passes."""
        return self.value <= self.threshold.limit


_ROUNDING = "the same weights in the same fp32 arithmetic: only the order of sums may differ"
_CACHE = "the cache must not change what a token means"

THRESHOLDS = (
    Threshold(EVERY, "graph_prefill", "max_abs", 1e-3, _ROUNDING),
    Threshold(EVERY, "graph_prefill", "relative_l2", 1e-5, _ROUNDING),
    Threshold(EVERY, "graph_decode", "max_abs", 1e-3, _ROUNDING),
    Threshold(EVERY, "graph_decode", "relative_l2", 1e-5, _ROUNDING),
    Threshold(EVERY, "consistency_strict", "max_abs", 1e-3, _CACHE),
    Threshold("fp32", "greedy_strict", "divergences", 0, "nothing was rounded"),
    Threshold("fp32", "quantization", "mean_kl", 1e-6, "the weights are copied"),
    Threshold("fp16", "quantization", "mean_kl", 1e-3, "weights rounded to 11 bits"),
    Threshold("int8", "quantization", "mean_kl", 0.05, "weights rounded to 8 bits in blocks"),
)


def thresholds(precision: str, max_kl: float | None = None) -> tuple[Threshold, ...]:
    """The rows for packages of `precision`; `max_kl` adds the user's own limit, in nats, on what is
    lost against the original weights: by the weights alone, and by the package as it ships."""
    rows = tuple(row for row in THRESHOLDS if row.precision in (EVERY, precision))
    if max_kl is None:
        return rows
    own = (
        Threshold(EVERY, measure, "mean_kl", max_kl, "asked for")
        for measure in ("quantization", "total_decode")
    )
    return (*rows, *own)


def check(
    rows: tuple[Threshold, ...], values: Mapping[tuple[str, str], float]
) -> tuple[Check, ...]:
    """Hold `rows` against `values`, which maps (measure, metric) to what was measured."""
    return tuple(Check(row, values[row.measure, row.metric]) for row in rows)
