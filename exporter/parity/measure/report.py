"""The result of a validation: figures, verdicts, and what they were measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llama_onnx.exporter.parity.measure.about import About
from llama_onnx.exporter.parity.measure.long import LongContext
from llama_onnx.exporter.parity.measure.sample import Sample
from llama_onnx.exporter.parity.measure.tokenizers import TokenizerCheck
from llama_onnx.exporter.parity.measure.weights import WeightError
from llama_onnx.runtime.measure.fidelity import Fidelity
from llama_onnx.runtime.measure.jsontext import dumps
from llama_onnx.runtime.measure.metrics import Comparison, Divergence
from llama_onnx.runtime.measure.situations import Passage
from llama_onnx.runtime.measure.speed import Speed
from llama_onnx.runtime.measure.thresholds import Check, Threshold

_SAME_FILES = "every file that the manifest names must have the hash given there"
_SAME_TOKENIZER = "the package must tokenize text as its source does"


@dataclass(frozen=True)
class Measurement:
    """One kind of `error` in one situation ("" for "quantization", which does not depend on how the
    graph is fed); `validate` lists the kinds."""

    error: str
    situation: str
    figures: Comparison


@dataclass(frozen=True)
class LayerError:
    """Relative L2 error of the hidden states after one stage (after "head": of the logits)."""

    stage: str
    graph: float
    quantization: float


@dataclass(frozen=True)
class Curve:
    """Relative L2 error of the logits and KL divergence (nats) at each position of one passage."""

    error: str
    passage: int
    relative_l2: tuple[float, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations checked by teacher forcing: the reference reads prompt and continuation
    in one pass, and at every position must choose the token that follows.

    `name` "graph" is the graph with fp32 activations against the package's weights, "shipped" the
    package as it ships against the original weights. `divergences` has the first one of each
    prompt, None where the continuation is identical; `agreement` is the share of all tokens that
    the reference chooses too.
    """

    name: str
    tokens: int
    agreement: float
    divergences: tuple[Divergence | None, ...]

    @property
    def identical(self) -> int:
        """Number of continuations that equal the reference's, token for token."""
        return sum(divergence is None for divergence in self.divergences)


@dataclass(frozen=True)
class Verdict:
    """Whether one requirement holds in all situations.

    `worst` is the value farthest beyond, or nearest to, the `limit`: the largest one, and a NaN
    before any number. `missed` are the situations in which the limit is missed ("" for a
    requirement without situations), out of `situations`.
    """

    measure: str
    metric: str
    worst: float
    limit: float
    reason: str
    missed: tuple[str, ...]
    situations: int

    @property
    def name(self) -> str:
        """Measure and metric: "graph max_abs"."""
        return f"{self.measure} {self.metric}"

    @property
    def passed(self) -> bool:
        """Whether the requirement holds everywhere."""
        return not self.missed

    @property
    def where(self) -> str:
        """The situations in which the limit is missed, for people; "" if none has a name."""
        if len(self.missed) == self.situations > 1:
            return "in every situation"
        return ", ".join(filter(None, self.missed))


@dataclass(frozen=True)
class ParityReport:
    """Everything that was measured, and the thresholds it was compared with.

    `original` names the checkpoint. `tokenizer` is None when the source has none to compare with.
    `trained_length` is the number of positions the model was trained on, None if that is the whole
    context. `long` is None unless it was requested, `fidelity` where there was no text to measure
    it on. `passages`, the texts measured on, are not part of the JSON. `sample` is how much was
    read, None if the caller chose the prompts. `seconds` is how long each stage took.
    """

    package: str
    original: str
    precision: str
    activations: str
    provider: str
    positions: int
    trained_length: int | None
    weights: WeightError
    measurements: tuple[Measurement, ...]
    greedy: tuple[Greedy, ...]
    layers: tuple[LayerError, ...]
    curves: tuple[Curve, ...]
    checks: tuple[Check, ...]
    tokenizer: TokenizerCheck | None
    long: LongContext | None
    speed: Speed
    about: About
    fidelity: Fidelity | None
    passages: tuple[Passage, ...]
    sample: Sample | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """The verdict on conversion: whether every requirement holds. Fidelity has its own."""
        return all(verdict.passed for verdict in self.verdicts())

    @property
    def accepted(self) -> bool:
        """Both verdicts: the conversion passed, and the limits of fidelity hold, or the user
        accepts the loss."""
        return self.passed and (self.fidelity is None or self.fidelity.allowed)

    def figures(self, error: str, situation: str = "") -> Comparison:
        """Return the figures of `error` in `situation`; raises `KeyError` without such figures."""
        return self.by_situation(error)[situation]

    def by_situation(self, error: str) -> dict[str, Comparison]:
        """Return the figures of `error` by the situations it was measured in."""
        return {m.situation: m.figures for m in self.measurements if m.error == error}

    def limit(self, measure: str, metric: str) -> float | None:
        """Return the limit on `metric` of `measure`; None if there is none."""
        rows = (check.threshold for check in self.checks)
        found = (row.limit for row in rows if (row.measure, row.metric) == (measure, metric))
        return next(found, None)

    def verdicts(self) -> tuple[Verdict, ...]:
        """Return one verdict for each threshold, then those on the package's files."""
        rows = dict.fromkeys(check.threshold for check in self.checks)
        return (*(_verdict(row, self.checks) for row in rows), *self._verdicts_on_files())

    def _verdicts_on_files(self) -> Iterator[Verdict]:
        if self.tokenizer is not None:
            yield _count("tokenizer", "differences", self.tokenizer.differences, _SAME_TOKENIZER)
        yield _count("files", "altered", len(self.about.altered), _SAME_FILES)

    def to_json(self, **further: Any) -> str:
        """Return JSON text, with `further` keys; a figure that is not finite becomes null."""
        content = asdict(self)
        del content["passages"]
        content["reference"] = content.pop("original")  # the key that scripts read
        content["checks"] = [check_.to_json() for check_ in self.checks]
        for entry, greedy in zip(content["greedy"], self.greedy, strict=True):
            entry["identical"] = greedy.identical
        if self.tokenizer:
            content["tokenizer"]["passed"] = self.tokenizer.passed
        content["altered"] = list(self.about.altered)
        content["fidelity"] = self.fidelity.to_json() if self.fidelity else None
        verdicts = {"passed": self.passed, "conversion": {"passed": self.passed}}
        return dumps({**verdicts, **content, **further})


def _count(measure: str, metric: str, count: int, reason: str) -> Verdict:
    """Return a verdict on something that must not occur."""
    return Verdict(measure, metric, count, 0, reason, ("",) if count else (), 1)


def _verdict(row: Threshold, checks: Iterable[Check]) -> Verdict:
    mine = [check for check in checks if check.threshold == row]
    return Verdict(
        row.measure,
        row.metric,
        _worst([check.value for check in mine]),
        row.limit,
        row.reason,
        tuple(check.situation for check in mine if not check.passed),
        len(mine),
    )


def _worst(values: Sequence[float]) -> float:
    """Return the largest value; a NaN counts as larger than any."""
    return next((value for value in values if value != value), max(values))
