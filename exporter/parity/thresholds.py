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
_NEAREST = "rounding to nearest cannot move a weight farther than one step of its block"
# Measured: 0.024 to 0.032 on tiny models and SmolLM2-135M, 0.05 on random weights of 7B geometry.
_INT8 = "int8 activations: twice the largest error seen on a sound package"

THRESHOLDS = (
    Threshold(EVERY, "weights", "steps", 1.001, _NEAREST),
    Threshold(EVERY, "graph_prefill", "max_abs", 1e-3, _ROUNDING),
    Threshold(EVERY, "graph_prefill", "relative_l2", 1e-5, _ROUNDING),
    Threshold(EVERY, "graph_decode", "max_abs", 1e-3, _ROUNDING),
    Threshold(EVERY, "graph_decode", "relative_l2", 1e-5, _ROUNDING),
    Threshold(EVERY, "consistency_strict", "max_abs", 1e-3, _CACHE),
    Threshold(EVERY, "activation_prefill", "relative_l2", 0.1, _INT8),
    Threshold(EVERY, "activation_decode", "relative_l2", 0.1, _INT8),
    Threshold(EVERY, "consistency_shipped", "relative_l2", 0.1, _INT8),
    Threshold("fp32", "greedy_strict", "divergences", 0, "nothing was rounded"),
    Threshold("fp32", "quantization", "mean_kl", 1e-6, "the weights are copied"),
    Threshold("fp16", "quantization", "mean_kl", 1e-3, "weights rounded to 11 bits"),
    Threshold("int8", "quantization", "mean_kl", 0.05, "weights rounded to 8 bits in blocks"),
)


_SHIPPED_ONLY = ("activation_prefill", "activation_decode", "consistency_shipped")


def thresholds(
    precision: str, max_kl: float | None = None, *, int8_activations: bool = False
) -> tuple[Threshold, ...]:
    """The rows for packages of `precision`; `max_kl` adds the user's own limit, in nats, on what is
    lost against the original weights: by the weights alone, and by the package as it ships. Rows of
    what rounded activations cost are only for packages that round them."""
    rows = tuple(
        row
        for row in THRESHOLDS
        if row.precision in (EVERY, precision)
        and (int8_activations or row.measure not in _SHIPPED_ONLY)
    )
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
