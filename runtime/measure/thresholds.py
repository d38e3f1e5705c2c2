"""The limits of parity: rows of thresholds.csv, each with the reason for its value."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

EVERY = "every"

NEAREST = "rtn"
"""The quantizer that rounds to nearest, which a package that names none was made with."""


@dataclass(frozen=True)
class Threshold:
    """`metric` of `measure` must be at most `limit`.

    It applies to packages of `precision` with `activations` in "fp32", "fp16" or "int8", on
    `provider`, whose codes `quantizer` chose ("rtn" too if nothing is quantized). `measure` names
    what was measured: "weights", "graph", "quantization", "total" and "greedy" by `validate`,
    "shipped" by `validate` and `verify`.
    """

    precision: str
    activations: str
    provider: str
    measure: str
    metric: str
    limit: float
    reason: str
    quantizer: str = EVERY

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Threshold:
        """Read a row of the table or of a certificate; raise `ValueError` or `KeyError`."""
        row = {"quantizer": EVERY, **row}  # certificates of 0.1 have no quantizers
        texts = {key: str(row[key]) for key in cls.__dataclass_fields__ if key != "limit"}
        limit = float(row["limit"])
        if not math.isfinite(limit):
            raise ValueError("a limit that is not a number")
        return cls(**texts, limit=limit)

    def to_json(self) -> dict[str, Any]:
        """Return the row as a mapping, which `from_row` reads."""
        return asdict(self)

    def applies(
        self, precision: str, activations: str, provider: str, quantizer: str = NEAREST
    ) -> bool:
        """Whether the row applies to such a package on such a provider."""
        pairs = (
            (self.precision, precision),
            (self.activations, activations),
            (self.provider, provider),
            (self.quantizer, quantizer),
        )
        return all(mine in (EVERY, its) for mine, its in pairs)


@dataclass(frozen=True)
class Check:
    """A threshold, and the value measured in one `situation` ("" where there are none)."""

    threshold: Threshold
    situation: str
    value: float

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN never is."""
        return self.value <= self.threshold.limit

    def to_json(self) -> dict[str, Any]:
        """Return everything, the verdict included."""
        row = self.threshold.to_json()
        return {**row, "situation": self.situation, "value": self.value, "passed": self.passed}


def all_thresholds() -> tuple[Threshold, ...]:
    """Return every row of thresholds.csv."""
    text = files(__package__).joinpath("thresholds.csv").read_text("utf-8")
    return tuple(Threshold.from_row(row) for row in csv.DictReader(text.splitlines()))


def thresholds(
    precision: str,
    activations: str,
    provider: str,
    max_kl: float | None = None,
    quantizer: str = NEAREST,
) -> tuple[Threshold, ...]:
    """Return the rows for such a package.

    `max_kl` adds the user's limit, in nats, on the KL divergence from the original weights: of the
    package's weights, and of the package as it ships.
    """
    kind = (precision, activations, provider, quantizer)
    rows = tuple(t for t in all_thresholds() if t.applies(*kind))
    if max_kl is None:
        return rows
    own = (
        Threshold(EVERY, EVERY, EVERY, measure, "mean_kl", max_kl, "asked for")
        for measure in ("quantization", "total")
    )
    return (*rows, *own)


def strictest(rows: Iterable[Threshold]) -> tuple[Threshold, ...]:
    """Return, of rows that limit the same metric of the same kind of package, the lowest limit."""
    least: dict[tuple[str, ...], Threshold] = {}
    for row in rows:
        kind = (row.precision, row.activations, row.provider, row.quantizer)
        key = (*kind, row.measure, row.metric)
        if key not in least or row.limit < least[key].limit:
            least[key] = row
    return tuple(least.values())


def check(
    rows: Iterable[Threshold], values: Mapping[tuple[str, str, str], float]
) -> tuple[Check, ...]:
    """Check every row against the `values`, by (measure, situation, metric), that it applies to."""
    return tuple(
        Check(row, situation, value)
        for row in rows
        for (measure, situation, metric), value in values.items()
        if (measure, metric) == (row.measure, row.metric)
    )
