"""What parity must hold: one row a limit, in thresholds.csv, each with the reason for its value."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

EVERY = "every"


@dataclass(frozen=True)
class Threshold:
    """`metric` of `measure` must be at most `limit`.

    For packages of `precision` whose `activations` are kept in "fp32", "fp16" or "int8", on
    `provider`. `measure` is what was measured: "weights", "graph", "quantization", "total"
    and "greedy" by `validate`, "shipped" by `validate` and `verify`.
    """

    precision: str
    activations: str
    provider: str
    measure: str
    metric: str
    limit: float
    reason: str

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Threshold:
        """A row of the table, or of a certificate; raises `ValueError` or `KeyError`."""
        texts = {key: str(row[key]) for key in cls.__dataclass_fields__ if key != "limit"}
        return cls(**texts, limit=float(row["limit"]))

    def to_json(self) -> dict[str, Any]:
        """The row as a mapping, which `from_row` reads."""
        return asdict(self)

    def applies(self, precision: str, activations: str, provider: str) -> bool:
        """Whether the row is meant for such a package on such a provider."""
        asked = (self.precision, precision), (self.activations, activations)
        return all(mine in (EVERY, its) for mine, its in (*asked, (self.provider, provider)))


@dataclass(frozen=True)
class Check:
    """A threshold held against what was measured in one `situation` ("" where there are none)."""

    threshold: Threshold
    situation: str
    value: float

    @property
    def passed(self) -> bool:
        """Whether the limit holds; a NaN never passes."""
        return self.value <= self.threshold.limit

    def to_json(self) -> dict[str, Any]:
        """Everything, the verdict included."""
        row = self.threshold.to_json()
        return {**row, "situation": self.situation, "value": self.value, "passed": self.passed}


def all_thresholds() -> tuple[Threshold, ...]:
    """Every row of thresholds.csv."""
    text = files(__package__).joinpath("thresholds.csv").read_text("utf-8")
    return tuple(Threshold.from_row(row) for row in csv.DictReader(text.splitlines()))


def thresholds(
    precision: str, activations: str, provider: str, max_kl: float | None = None
) -> tuple[Threshold, ...]:
    """The rows for such a package; `max_kl` adds the user's own limit, in nats, on what is lost
    against the original weights: by the weights alone, and by the package as it ships."""
    rows = tuple(t for t in all_thresholds() if t.applies(precision, activations, provider))
    if max_kl is None:
        return rows
    own = (
        Threshold(EVERY, EVERY, EVERY, measure, "mean_kl", max_kl, "asked for")
        for measure in ("quantization", "total")
    )
    return (*rows, *own)


def check(
    rows: Iterable[Threshold], values: Mapping[tuple[str, str, str], float]
) -> tuple[Check, ...]:
    """Hold every row against all `values` it is meant for, by (measure, situation, metric)."""
    return tuple(
        Check(row, situation, value)
        for row in rows
        for (measure, situation, metric), value in values.items()
        if (measure, metric) == (row.measure, row.metric)
    )
