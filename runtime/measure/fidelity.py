"""How far a package is from its original, in words: the second verdict beside that on conversion.

fidelity.csv has the grades, and the limits of each recipe, each with the reason for its value.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from llama_onnx.runtime.measure.claimed_numbers import as_count, as_number
from llama_onnx.runtime.measure.metrics import Comparison
from llama_onnx.runtime.measure.thresholds import NEAREST

UNTRAINED = 0.9
"""A model whose perplexity on the text is above (vocabulary size) ** `UNTRAINED` has learned
nothing. One of random weights is near, or above, the size of the vocabulary itself; one that knew
only how often each token occurs in the text would be at its 0.50th to 0.58th power (SmolLM2's
tokenizer, and a vocabulary of 288 tokens)."""

METRICS = ("mean_kl", "other_top1", "perplexity_ratio")

ASKED_FOR = "asked for"

TEXTS = ("built-in", "own")
"""What fidelity is measured on: our text, or the user's."""

_SMALL_BITS, _BEST_BITS = 4.5, 5.3  # the most bits a weight of these presets


@dataclass(frozen=True)
class Loss:
    """What is lost against the original over some `positions` of a text, with standard errors.

    `mean_kl` is in nats, `other_top1` the share of positions with another likeliest token,
    `perplexity_ratio` that of package to original.
    """

    positions: int
    mean_kl: float
    mean_kl_error: float
    other_top1: float
    other_top1_error: float
    perplexity_ratio: float
    perplexity_ratio_error: float
    p99_kl: float

    @classmethod
    def of(cls, compared: Comparison) -> Loss:
        """Return the loss that `compared` has; figures without a value are NaN."""
        figures = asdict(compared)
        figures["other_top1"] = 1 - compared.same_top1
        figures["other_top1_error"] = compared.same_top1_error
        names = [field.name for field in fields(cls)]
        values: dict[str, Any] = {n: math.nan if figures[n] is None else figures[n] for n in names}
        return cls(**values)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Loss:
        """Read what a certificate has; raises `KeyError`, `TypeError` or `ValueError`."""
        found: dict[str, Any] = {f.name: as_number(values[f.name]) for f in fields(cls)}
        return cls(**{**found, "positions": as_count(values["positions"])})

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.2g} ± {self.mean_kl_error:.1g} nats, another likeliest token "
            f"at {self.other_top1:.1%} ± {self.other_top1_error:.1%} of {self.positions:,} "
            f"positions, perplexity {self.perplexity_ratio:.3f} ± {self.perplexity_ratio_error:.3f}"
            " times the original's"
        )


@dataclass(frozen=True)
class Row:
    """A row of fidelity.csv: the most that each metric may be, infinite where the table has none.

    `kind` "grade" has the word `name` for such a loss, from the best grade to the worst. `kind`
    "limit" has the limits of the recipe `name` for models of this many `parameters` and more.
    `basis` is "measured" (by us, on a model of 135M) or "published" (by others, on models of 7B
    and 8B).
    """

    kind: str
    name: str
    parameters: int
    mean_kl: float
    other_top1: float
    perplexity_ratio: float
    basis: str
    reason: str

    @classmethod
    def from_text(cls, row: Mapping[str, str]) -> Row:
        """Read a row of the table."""
        values: dict[str, Any] = dict(row)
        limits = {metric: float(row[metric] or math.inf) for metric in METRICS}
        return cls(**{**values, "parameters": int(row["parameters"]), **limits})

    def holds(self, loss: Loss) -> bool:
        """Whether `loss` is within all limits; NaN never is, not even where there is no limit."""
        return all(getattr(loss, metric) <= getattr(self, metric) for metric in METRICS)


@dataclass(frozen=True)
class Limit:
    """The most that `metric` may be, and its `value`. `basis` is as in `Row`, or `ASKED_FOR`."""

    metric: str
    value: float
    limit: float
    basis: str
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN never is."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Fidelity:
    """The verdict on fidelity of a package made by `recipe` from a model of `parameters`.

    `shipped` is the loss of the package as it ships, `weights` that of its weights in PyTorch, both
    on `text`: "built-in" or "own". `original_perplexity` is the original's on the same text, over
    `vocab_size` tokens. `max_kl` is a limit that the user asked for. `accepted`: the user accepts
    what is beyond the limits of the recipe.
    """

    recipe: str
    parameters: int
    text: str
    original_perplexity: float
    vocab_size: int
    shipped: Loss
    weights: Loss
    max_kl: float | None = None
    accepted: bool = False

    @property
    def grade(self) -> str:
        """The word for the loss of the package as it ships."""
        return grade_of(self.shipped).name

    @property
    def trained(self) -> bool:
        """Whether the original predicts the text at all; random weights do not."""
        return math.log(self.original_perplexity) <= UNTRAINED * math.log(self.vocab_size)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits of the recipe, which a model that is not `trained` does not have, and the
        user's."""
        row = limits_of(self.recipe, self.parameters) if self.trained else None
        ours = [] if row is None else [self._limit(m, getattr(row, m), row) for m in METRICS]
        if self.max_kl is not None:
            value = self.shipped.mean_kl
            ours.append(Limit("mean_kl", value, self.max_kl, ASKED_FOR, ASKED_FOR))
        return tuple(ours)

    def _limit(self, metric: str, limit: float, row: Row) -> Limit:
        return Limit(metric, getattr(self.shipped, metric), limit, row.basis, row.reason)

    @property
    def missed(self) -> tuple[Limit, ...]:
        """The limits that are missed."""
        return tuple(limit for limit in self.limits if not limit.passed)

    @property
    def passed(self) -> bool:
        """Whether every limit holds."""
        return not self.missed

    @property
    def allowed(self) -> bool:
        """Whether every limit holds, or is of the recipe and the loss `accepted`."""
        return all(self.accepted and limit.basis != ASKED_FOR for limit in self.missed)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Fidelity:
        """Read what `to_json` returned; raises `KeyError`, `TypeError` or `ValueError`.

        Nobody vouches for the words in `values`: grade and limits are those of our own table.
        """
        recipe, text, max_kl = values["recipe"], values["text"], values["max_kl"]
        if recipe not in recipes() or text not in TEXTS:
            raise ValueError("a recipe or text that nobody knows")
        return cls(
            recipe=recipe,
            parameters=as_count(values["parameters"]),
            text=text,
            original_perplexity=as_number(values["original_perplexity"]),
            vocab_size=as_count(values["vocab_size"]),
            shipped=Loss.from_json(values["shipped"]),
            weights=Loss.from_json(values["weights"]),
            max_kl=None if max_kl is None else as_number(max_kl),
            accepted=values["accepted"] is True,
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything, grade and verdict first."""
        limits = [{**asdict(limit), "passed": limit.passed} for limit in self.limits]
        head = {"grade": self.grade, "passed": self.passed, "trained": self.trained}
        return {**head, **asdict(self), "limits": limits}


@cache
def table() -> tuple[Row, ...]:
    """Return every row of fidelity.csv."""
    text = files(__package__).joinpath("fidelity.csv").read_text("utf-8")
    return tuple(Row.from_text(row) for row in csv.DictReader(text.splitlines()))


def grades() -> tuple[Row, ...]:
    """Return the grades, from the best to the worst, which has no limits."""
    return tuple(row for row in table() if row.kind == "grade")


def recipes() -> frozenset[str]:
    """Return the names of all recipes that have limits."""
    return frozenset(row.name for row in table() if row.kind == "limit")


def grade_of(loss: Loss) -> Row:
    """Return the best grade all three of whose limits hold; for a NaN, the worst."""
    *better, worst = grades()
    return next((row for row in better if row.holds(loss)), worst)


def limits_of(recipe: str, parameters: int) -> Row | None:
    """Return the row of `recipe` for a model of so many `parameters`; None if there is none."""
    rows = (r for r in table() if (r.kind, r.name) == ("limit", recipe))
    fitting = [row for row in rows if row.parameters <= parameters]
    return max(fitting, key=lambda row: row.parameters, default=None)


def recipe_of(recipe: Mapping[str, Any], precision: str, bits: float) -> str:
    """Return the name under which fidelity.csv has the limits of a package.

    `recipe` is the manifest's, `bits` are those of the data file for each weight. A calibrated
    package of int4 is held to the preset of its size, one by a quantizer that takes minutes to
    nothing better than the default, and one whose matrices got large blocks of 4 bits, which only
    the least time asks for, to "fast".

    >>> recipe_of({"quantizer": "rtn"}, "int4", 5.1)
    'int4 rtn'
    >>> recipe_of({"quantizer": "awq"}, "int4", 4.4)
    'small'
    >>> recipe_of({"quantizer": "best", "chosen": [{"bits": 4, "block_size": 128}]}, "int4", 5.2)
    'fast'
    """
    if precision != "int4":
        return precision
    quantizer = recipe.get("quantizer") or NEAREST
    if quantizer == NEAREST:
        return f"{precision} {NEAREST}"
    if bits <= _SMALL_BITS:
        return "small"
    if quantizer != "best":
        return "default"
    if _has_large_blocks(recipe):
        return "fast"
    return "best" if bits <= _BEST_BITS else "careful"


def _has_large_blocks(recipe: Mapping[str, Any]) -> bool:
    chosen = recipe.get("chosen")
    ways = [way for way in chosen if isinstance(way, Mapping)] if isinstance(chosen, list) else []
    return any((way.get("bits"), way.get("block_size")) == (4, 128) for way in ways)
