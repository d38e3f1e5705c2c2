"""How the next token is chosen: one set of parameters for Python, the command line and servers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from llama_onnx.targets.errors import UsageError


def _parameter(kind: type, explanation: str) -> Any:
    """A field that is None by default, with the metadata that interfaces show and check."""
    return field(default=None, metadata={"type": kind, "help": explanation})


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token; None leaves a choice to the package, greedy by default.

    A temperature above 0, `top_k` or `top_p` turns sampling on; temperature 0 turns it off. Raises
    `UsageError` for a value out of range.

    >>> Sampling(temperature=0.7, seed=1).search_options()
    {'temperature': 0.7, 'random_seed': 1, 'do_sample': True}
    >>> Sampling(top_p=2.0)
    Traceback (most recent call last):
    llama_onnx.targets.errors.UsageError: top-p must be above 0 and at most 1 (off), not 2.0.
    """

    temperature: float | None = _parameter(float, "Sampling temperature; 0 is greedy.")
    top_k: int | None = _parameter(int, "Sample from the K likeliest tokens; 0 is all.")
    top_p: float | None = _parameter(
        float, "Sample from the likeliest tokens whose probabilities sum to P."
    )
    seed: int | None = _parameter(int, "Seed that makes sampling repeatable.")

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise UsageError(f"the temperature must be 0 (greedy) or more, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 0:
            raise UsageError(f"top-k must be 0 (off) or more, not {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top-p must be above 0 and at most 1 (off), not {self.top_p}.")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"the seed must be 0 or more, not {self.seed}.")

    def override(self, **given: Any) -> Sampling:
        """Return a copy with the `given` values that are not None."""
        values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return replace(self, **values)

    def to_json(self) -> dict[str, int | float]:
        """Return the parameters that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def search_options(self) -> dict[str, bool | int | float]:
        """Return onnxruntime-genai's search options; for all others the package decides."""
        options: dict[str, bool | int | float] = dict(self.to_json())
        if "seed" in options:
            options["random_seed"] = options.pop("seed")
        if self.temperature == 0:
            del options["temperature"]
            options["do_sample"] = False
        elif options.keys() - {"random_seed"}:
            options["do_sample"] = True
        return options


PARAMETERS = {entry.name: entry.metadata for entry in fields(Sampling)}
"""Name -> `type` and `help` of each field of `Sampling`."""

PACKAGE_DEFAULT = Sampling()
"""Leaves all choices to the package."""
