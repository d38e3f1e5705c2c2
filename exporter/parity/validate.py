"""Is a package the model it was made from? Each kind of error measured by itself.

    graph error            onnxruntime, fp32 activations   against  PyTorch on the package's weights
    activation error       onnxruntime, as shipped         against  PyTorch on the package's weights
    quantization error     PyTorch on the package's weights against  PyTorch on the original weights
    total                  onnxruntime, as shipped         against  PyTorch on the original weights

Beside them, and whatever the prompts: no weight lies farther from its original than rounding to
nearest can move it. The first error must be at rounding level for every precision: a check that
mixes it with the third can hide a bug behind int4. All of them are measured on ids; that a text has
the same ids in package and source is checked beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_onnx.exporter.checkpoints.base import Checkpoint, Float32
from llama_onnx.exporter.checkpoints.lora import adapters_of
from llama_onnx.exporter.checkpoints.package import PackageCheckpoint
from llama_onnx.exporter.parity.metrics import (
    NO_TARGET,
    Comparison,
    Divergence,
    Ids,
    compare,
    first_divergence,
)
from llama_onnx.exporter.parity.session import (
    FP32_ACTIVATIONS,
    PROVIDER,
    PackageSession,
    Trace,
    quantizes_activations,
)
from llama_onnx.exporter.parity.thresholds import Check, check, thresholds
from llama_onnx.exporter.parity.tokenizers import TokenizerCheck, check_tokenizer
from llama_onnx.exporter.parity.weights import WeightError, compare_weights
from llama_onnx.exporter.walk import walk
from llama_onnx.targets.errors import UsageError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""

NEAR_TIE = 2e-3
"""Logits. Two candidates this close may change places within the graph's own limit of 1e-3."""

_STRICT, _SHIPPED = "fp32 activations", "as shipped"
_PACKAGE, _ORIGINAL = "PyTorch, package's weights", "PyTorch, original weights"

# What makes a model another function; names of tokens and the length of the context do not.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)


@dataclass(frozen=True)
class Measurement:
    """One kind of error: `candidate` against `reference`, in words and in figures.

    `graph_*`, `activation_*`, `quantization` and `total_*` are the errors above; `consistency_*`
    is the same graph's decode against its own prefill.
    """

    name: str
    candidate: str
    reference: str
    figures: Comparison


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations checked by teacher forcing: the reference reads prompt and continuation
    in one pass and must choose, at every position, the token that stands there.

    `greedy_strict` is the graph with fp32 activations against the package's weights,
    `greedy_shipped` the graph as it ships against the original ones. `divergences` has the first
    one of each prompt, None where the continuation is identical; `agreement` is the share of all
    tokens chosen that are the reference's choice too.
    """

    name: str
    tokens: int
    agreement: float
    divergences: tuple[Divergence | None, ...]

    @property
    def identical(self) -> int:
        """Number of continuations that are the reference's own, token for token."""
        return sum(divergence is None for divergence in self.divergences)


@dataclass(frozen=True)
class ParityReport:
    """Everything measured, and the thresholds it was held against. `tokenizer` is None when the
    source has none to compare with."""

    package: str
    reference: str
    precision: str
    provider: str
    positions: int
    weights: WeightError
    measurements: tuple[Measurement, ...]
    greedy: tuple[Greedy, ...]
    checks: tuple[Check, ...]
    tokenizer: TokenizerCheck | None

    @property
    def passed(self) -> bool:
        """Whether every threshold holds and the tokenizer is the source's."""
        same_tokens = self.tokenizer is None or self.tokenizer.passed
        return same_tokens and all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """The report as JSON text; a figure that is not finite becomes null."""
        content = asdict(self)
        for entry, check_ in zip(content["checks"], self.checks, strict=True):
            entry["passed"] = check_.passed
        for entry, greedy in zip(content["greedy"], self.greedy, strict=True):
            entry["identical"] = greedy.identical
        if self.tokenizer:
            content["tokenizer"]["passed"] = self.tokenizer.passed
        return json.dumps({"passed": self.passed, **_finite(content)}, indent=2)


@dataclass(frozen=True)
class Side:
    """Logits [S, V] for each sequence, and what computed them."""

    name: str
    logits: list[Float32]


@dataclass(frozen=True)
class Evidence:
    """What a graph makes of the prompts (`prefill`, `decode`), and what the reference makes of the
    very same ids on the package's weights (`dequantized`) and on the original ones."""

    traces: list[Trace]
    prefill: Side
    decode: Side
    dequantized: Side
    original: Side

    @classmethod
    def of(
        cls, how: str, traces: list[Trace], dequantized: list[Float32], original: list[Float32]
    ) -> Evidence:
        """Name the sides; `how` says what the graph's activations are."""
        return cls(
            traces,
            Side(f"onnxruntime prefill, {how}", [trace.prefill for trace in traces]),
            Side(f"onnxruntime decode, {how}", [trace.decode for trace in traces]),
            Side(_PACKAGE, dequantized),
            Side(_ORIGINAL, original),
        )

    def measure(self, name: str, candidate: Side, reference: Side) -> Measurement:
        """Compare two sides. Only prompts are text to predict, not their continuations."""
        targets = [_targets(trace) for trace in self.traces]
        figures = compare(reference.logits, candidate.logits, targets)
        return Measurement(name, candidate.name, reference.name, figures)


def validate(
    package: Path,
    reference: Checkpoint,
    prompts: Sequence[Ids],
    *,
    texts: Sequence[str] = (),
    tokens: int = 64,
    max_kl: float | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Measure `package` against `reference` on `prompts` (ids [P] each) and `tokens` greedy tokens
    after each (2 or more: the first comes out of the prefill, the others are decoded). The two
    tokenizers are compared on a fixed set of texts and on `texts`.

    One session or one layer of weights is in memory at a time, besides the logits themselves
    (float32, vocabulary x positions, up to seven times over). Raises `UsageError` when the two
    are not the same architecture, `PackageError` when the package cannot be read or run.
    """
    weights = PackageCheckpoint.open(package)
    check_same_model(weights, reference)
    tokenizer = check_tokenizer(package, reference, texts)
    distance = compare_weights(weights, reference, _label("weights", progress))
    strict, shipped = _gather(package, weights, reference, prompts, tokens, progress)
    measurements = tuple(_measurements(strict, shipped))
    greedy = (
        _teacher_forced("greedy_strict", strict.traces, strict.dequantized.logits),
        _teacher_forced("greedy_shipped", shipped.traces, shipped.original.logits),
    )
    values = {(m.name, key): v for m in measurements for key, v in asdict(m.figures).items()}
    values |= {(g.name, "divergences"): len(prompts) - g.identical for g in greedy}
    values["weights", "steps"] = distance.steps
    limits = thresholds(weights.precision, max_kl, int8_activations=shipped is not strict)
    return ParityReport(
        package=str(package),
        reference=" + ".join(map(str, (reference.path, *adapters_of(reference)))),
        precision=weights.precision,
        provider=PROVIDER,
        positions=sum(len(trace.ids) for trace in strict.traces),
        measurements=measurements,
        greedy=greedy,
        weights=distance,
        checks=check(limits, values),
        tokenizer=tokenizer,
    )


def check_same_model(package: PackageCheckpoint, reference: Checkpoint) -> None:
    """Raise `UsageError` unless both are the same function but for their weights."""
    for key in _SAME:
        there, here = getattr(package.config, key), getattr(reference.config, key)
        if there != here:
            raise UsageError(
                f"{package.path} was not made from {reference.path}: {key} is {there} in the "
                f"package and {here} in the reference."
            )


def _gather(
    package: Path,
    weights: PackageCheckpoint,
    reference: Checkpoint,
    prompts: Sequence[Ids],
    tokens: int,
    progress: Progress | None,
) -> tuple[Evidence, Evidence]:
    """Evidence of the graph with float32 activations and of the graph as shipped; one and the same
    when it ships so. Each set of weights is walked once for both."""
    apart = quantizes_activations(package)
    session = PackageSession.open(package, FP32_ACTIVATIONS)
    traces = _traces(session, prompts, tokens, _label(f"onnxruntime, {_STRICT}", progress))
    del session  # its copy of the weights goes before the next one comes
    if apart:
        session = PackageSession.open(package)
        traces += _traces(session, prompts, tokens, _label(f"onnxruntime, {_SHIPPED}", progress))
        del session
    sequences = [trace.ids for trace in traces]
    dequantized = walk(weights, sequences, _label(_PACKAGE, progress))
    original = walk(reference, sequences, _label(_ORIGINAL, progress))
    n = len(prompts)
    strict = Evidence.of(_STRICT, traces[:n], dequantized[:n], original[:n])
    if not apart:
        return strict, strict
    return strict, Evidence.of(_SHIPPED, traces[n:], dequantized[n:], original[n:])


def _traces(
    session: PackageSession,
    prompts: Sequence[Ids],
    tokens: int,
    progress: Callable[[int, int], None],
) -> list[Trace]:
    traces: list[Trace] = []
    for index, prompt in enumerate(prompts):
        # Every second prompt fills the cache with its first token alone, then with the rest: one
        # position without a past, many with one.
        pieces = [prompt[:1], prompt[1:]] if index % 2 and len(prompt) > 1 else [prompt]
        traces.append(session.trace(pieces, tokens))
        progress(len(traces), len(prompts))
    return traces


def _measurements(strict: Evidence, shipped: Evidence) -> Iterator[Measurement]:
    yield strict.measure("graph_prefill", strict.prefill, strict.dequantized)
    yield strict.measure("graph_decode", strict.decode, strict.dequantized)
    yield strict.measure("consistency_strict", strict.decode, strict.prefill)
    if shipped is not strict:
        yield shipped.measure("consistency_shipped", shipped.decode, shipped.prefill)
        yield shipped.measure("activation_prefill", shipped.prefill, shipped.dequantized)
        yield shipped.measure("activation_decode", shipped.decode, shipped.dequantized)
    yield strict.measure("quantization", strict.dequantized, strict.original)
    yield shipped.measure("total_prefill", shipped.prefill, shipped.original)
    yield shipped.measure("total_decode", shipped.decode, shipped.original)


def _teacher_forced(name: str, traces: list[Trace], reference: list[Float32]) -> Greedy:
    divergences, agreeing = [], []
    for trace, logits in zip(traces, reference, strict=True):
        rows = logits[trace.prompt_length - 1 :]  # [n, V]: where the n tokens were chosen
        divergences.append(first_divergence(rows, trace.tokens))
        agreeing.append(rows.argmax(axis=-1) == np.array(trace.tokens))  # [n]
    return Greedy(name, len(traces[0].tokens), float(np.mean(agreeing)), tuple(divergences))


def _targets(trace: Trace) -> Ids:
    targets = np.full(len(trace.ids), NO_TARGET)
    targets[: trace.prompt_length - 1] = trace.ids[1 : trace.prompt_length]
    return targets


def _label(what: str, progress: Progress | None) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress:
            progress(what, done, total)

    return report


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
