"""The result of a validation: figures, verdicts, and what they were measured on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llama_onnx.exporter.parity.measure.about import About
from llama_onnx.exporter.parity.measure.long import LongContext
from llama_onnx.exporter.parity.measure.tokenizers import TokenizerCheck
from llama_onnx.exporter.parity.measure.weights import WeightError
from llama_onnx.runtime.measure.jsontext import dumps
from llama_onnx.runtime.measure.metrics import Comparison, Divergence
from llama_onnx.runtime.measure.situations import Passage
from llama_onnx.runtime.measure.speed import Speed
from llama_onnx.runtime.measure.thresholds import Check


@dataclass(frozen=True)
class Measurement:
    """One kind of `error` in one situation ("" for the quantization's, which no way of feeding the
    graph changes); `validate` lists the kinds."""

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
class ParityReport:
    """Everything that was measured, and the thresholds it was held against.

    `original` names the checkpoint. `tokenizer` is None when the source has none to compare with.
    `trained_length` is the number of positions the model was trained on, None if that is the whole
    context. `long` is None unless it was asked for. `passages`, the texts measured on, are not part
    of the JSON.
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
    passages: tuple[Passage, ...]

    @property
    def passed(self) -> bool:
        """Whether every threshold holds and the tokenizer is the source's."""
        same_tokens = self.tokenizer is None or self.tokenizer.passed
        return same_tokens and all(check.passed for check in self.checks)

    def to_json(self, **further: Any) -> str:
        """Return JSON text, with `further` keys; a figure that is not finite becomes null."""
        content = asdict(self)
        del content["passages"]
        content["reference"] = content.pop("original")  # the name that certificates promise
        content["checks"] = [check_.to_json() for check_ in self.checks]
        for entry, greedy in zip(content["greedy"], self.greedy, strict=True):
            entry["identical"] = greedy.identical
        if self.tokenizer:
            content["tokenizer"]["passed"] = self.tokenizer.passed
        return dumps({"passed": self.passed, **content, **further})
