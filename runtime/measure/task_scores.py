"""What `llama-onnx evaluate --tasks` found, as certificates have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llama_onnx.runtime.measure.claimed_numbers import as_count
from llama_onnx.runtime.measure.evaluated import Estimate

KEY = "task_scores"
"""The entry of certificate.json."""


@dataclass(frozen=True)
class Score:
    """A metric of lm-eval after a filter of answers, "none" for no filter.

    `original` is that of the reference, `difference` the mean of package minus original over the
    same documents, each None where it was not measured.
    """

    metric: str
    filter: str
    higher_is_better: bool
    package: Estimate
    original: Estimate | None
    difference: Estimate | None

    @property
    def name(self) -> str:
        """The metric, with its filter if there is one."""
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"

    def sentence(self) -> str:
        """Return the figures in words, without the name."""
        text = self.package.text(".4f")
        if self.original is not None:
            text += f", the original {self.original.text('.4f')}"
        if self.difference is not None:
            text += f", paired difference {self.difference.text('+.4f')}"
        return text


@dataclass(frozen=True)
class TaskScores:
    """The scores on a task, which `sha256` of its definition and data identifies, by the version
    `lm_eval` of the harness."""

    task: str
    sha256: str
    lm_eval: str
    documents: int
    scores: tuple[Score, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskScores:
        """Read what `to_json` returned; raises `KeyError`, `TypeError` or `ValueError`."""
        scores = tuple(_score(score) for score in values["scores"])
        texts = {name: _text(values[name]) for name in ("task", "sha256", "lm_eval")}
        return cls(**texts, documents=as_count(values["documents"]), scores=scores)


def _score(values: Mapping[str, Any]) -> Score:
    better = values["higher_is_better"]
    if not isinstance(better, bool):
        raise TypeError("not a truth value")
    estimates = {
        name: None if values[name] is None else Estimate.from_json(values[name])
        for name in ("original", "difference")
    }
    package = Estimate.from_json(values["package"])
    return Score(_text(values["metric"]), _text(values["filter"]), better, package, **estimates)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value
