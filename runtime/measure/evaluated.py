"""What `llama-onnx evaluate` found, as certificates have it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from llama_onnx.runtime.measure.claimed_numbers import as_count, as_number

KEY = "evaluated"
"""The entry of certificate.json."""

Z95 = 1.959963984540054
"""Standard deviations of a normal distribution on either side that hold 95 %."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval, which is NaN where nothing gives one."""

    value: float
    low: float
    high: float

    @classmethod
    def normal(cls, value: float, error: float) -> Estimate:
        """Return the estimate of a normal distribution with the standard error `error`.

        >>> Estimate.normal(0.5, 0.1).text(".3f")
        '0.500 (0.304 to 0.696)'
        """
        return cls(value, value - Z95 * error, value + Z95 * error)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Estimate:
        """Read what a certificate says; raises `KeyError`, `TypeError` or `ValueError`."""
        low, high = values["low"], values["high"]
        if low is None and high is None:
            return cls(as_number(values["value"]), math.nan, math.nan)
        return cls(as_number(values["value"]), as_number(low), as_number(high))

    def exp(self) -> Estimate:
        """Return the estimate of the exponential."""
        return Estimate(math.exp(self.value), math.exp(self.low), math.exp(self.high))

    def text(self, form: str) -> str:
        """Return it in words; `form` is how each number is written.

        >>> Estimate(0.5, 0.25, 0.75).text(".0%")
        '50% (25% to 75%)'
        """
        if math.isnan(self.low):
            return f"{self.value:{form}}"
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Figures:
    """The package against its original, over `positions` in `passages` of a corpus.

    KL is in nats. `same_top1` is the share of positions where both have the same likeliest token.
    """

    positions: int
    passages: int
    mean_kl: Estimate
    max_kl: float
    same_top1: Estimate
    perplexity: Estimate
    original_perplexity: Estimate
    perplexity_ratio: Estimate


@dataclass(frozen=True)
class Evaluated:
    """The figures on a corpus, which `text` names and `sha256` identifies, read in passages of
    `length` tokens."""

    text: str
    sha256: str
    length: int
    figures: Figures

    def to_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluated:
        """Read what `to_json` returned; raises `KeyError`, `TypeError` or `ValueError`."""
        found = values["figures"]
        numbers: dict[str, Any] = {
            name: Estimate.from_json(found[name])
            for name in (field.name for field in fields(Figures))
            if name not in ("positions", "passages", "max_kl")
        }
        figures = Figures(
            positions=as_count(found["positions"]),
            passages=as_count(found["passages"]),
            max_kl=as_number(found["max_kl"]),
            **numbers,
        )
        text, sha256 = values["text"], values["sha256"]
        if not isinstance(text, str) or not isinstance(sha256, str):
            raise TypeError("a text")
        return cls(text, sha256, as_count(values["length"]), figures)

    def sentence(self) -> str:
        """Return the figures in words."""
        found = self.figures
        return (
            f"mean KL {found.mean_kl.text('.3g')} nats, the same likeliest token at "
            f"{found.same_top1.text('.2%')} of {found.positions:,} positions, perplexity "
            f"{found.perplexity_ratio.text('.4f')} times the original's"
        )
