"""Is a package the model it was made from? Each kind of error measured by itself.

    weights        every weight of the package        against  its original
    rotary         its rotary tables                  against  transformers' own
    graph          the graph, fp32 activations        against  PyTorch on the package's weights
    shipped        onnxruntime, as shipped            against  PyTorch on the package's weights
    quantization   PyTorch on the package's weights   against  PyTorch on the original weights
    total          onnxruntime, as shipped            against  PyTorch on the original weights

The graph's error must be at rounding level for every precision: a check that mixes it with the
quantization's can hide a bug behind int4. The graph and the session are measured in every situation
of `runtime.measure.situations`, on ids; that a text has the same ids in package and source is
checked beside them.

One session, or one layer of each model, is in memory at a time, besides the logits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from llama_onnx.exporter.checkpoints.lora import adapters_of, open_adapter
from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.checkpoints.package.same_model import check_same_model
from llama_onnx.exporter.model.checkpoint import Checkpoint, Float32
from llama_onnx.exporter.packaging.adapters import read_parameters
from llama_onnx.exporter.parity.measure.about import About, describe
from llama_onnx.exporter.parity.measure.long import LongContext, measure_long
from llama_onnx.exporter.parity.measure.rotary import rotary_error
from llama_onnx.exporter.parity.measure.shipped import NOTHING, Asked, Shipped, run_shipped
from llama_onnx.exporter.parity.measure.tokenizers import TokenizerCheck, check_tokenizer
from llama_onnx.exporter.parity.measure.weights import WeightError, compare_weights
from llama_onnx.exporter.reference.lockstep import HEAD, Stage, lockstep
from llama_onnx.runtime.measure.certificate import next_tokens
from llama_onnx.runtime.measure.graph_session import Adapter
from llama_onnx.runtime.measure.jsontext import dumps
from llama_onnx.runtime.measure.metrics import (
    NO_TARGET,
    Comparison,
    Divergence,
    Ids,
    PositionFigures,
    compare,
    figures_in_pieces,
    first_divergence,
    summarize,
)
from llama_onnx.runtime.measure.situations import (
    LONG_CONTEXT,
    Observation,
    Passage,
    Situation,
    join,
    run_plainly,
    situations_of,
)
from llama_onnx.runtime.measure.speed import Speed
from llama_onnx.runtime.measure.thresholds import Check, check, thresholds
from llama_onnx.targets.package import MODEL_FILE, ModelPackage
from llama_onnx.targets.providers import CPU

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True)
class Measurement:
    """One kind of `error` (see above) in one situation ("" for the quantization's, which no way of
    feeding changes)."""

    error: str
    situation: str
    figures: Comparison


@dataclass(frozen=True)
class LayerError:
    """Relative L2 of the hidden states behind one stage (behind "head": of the logits)."""

    stage: str
    graph: float
    quantization: float


@dataclass(frozen=True)
class Curve:
    """Relative L2 of the logits and KL divergence (nats) at each position of one passage."""

    error: str
    passage: int
    relative_l2: tuple[float, ...]
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations checked by teacher forcing: the reference reads prompt and continuation
    in one pass and must choose, at every position, the token that stands there.

    `name` "graph" is the graph with fp32 activations against the package's weights, "shipped" the
    package as it ships against the original ones. `divergences` has the first one of each prompt,
    None where the continuation is identical; `agreement` is the share of all tokens chosen that are
    the reference's choice too.
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
    source has none to compare with; `trained_length` is where positions end that the model was
    trained on, None if that is the whole context. `long` is None unless it was asked for.
    `passages`, what was measured on, are no part of the JSON."""

    package: str
    reference: str
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
        """As JSON text, with `further` keys; a figure that is not finite becomes null."""
        content = asdict(self)
        del content["passages"]
        content["checks"] = [check_.to_json() for check_ in self.checks]
        for entry, greedy in zip(content["greedy"], self.greedy, strict=True):
            entry["identical"] = greedy.identical
        if self.tokenizer:
            content["tokenizer"]["passed"] = self.tokenizer.passed
        return dumps({"passed": self.passed, **content, **further})


@dataclass(frozen=True)
class Evidence:
    """Everything that was run. Logits are float32 [N, V], one array for each of the passages of
    `shipped`, those called short for its `short` ones; `graph` has the figures of the graph with
    fp32 activations in each situation."""

    shipped: Shipped
    dequantized: list[Float32]
    original: list[Float32]
    short_dequantized: list[Float32]
    short_original: list[Float32]
    graph: dict[str, list[PositionFigures]]
    graph_choices: list[Ids]
    layers: tuple[LayerError, ...]


def validate(
    package: Path,
    reference: Checkpoint,
    asked: Asked,
    *,
    short: Asked = NOTHING,
    texts: Sequence[str] = (),
    situations: Sequence[Situation] | None = None,
    swapped: tuple[str, Path] | None = None,
    max_kl: float | None = None,
    thorough: bool = False,
    progress: Progress | None = None,
) -> tuple[ParityReport, Evidence]:
    """Measure `package` against `reference` on what is `asked`. The two tokenizers are compared on
    a fixed set of texts and on `texts`; `situations` None are all that mean something to the graph.
    `thorough` also goes to the context's end. The evidence
    returned beside the report has both references' logits on `short` too.

    `swapped` is the name of an adapter beside the package's base and the PEFT folder it was made
    from: it is active in the graph, and PyTorch has it added to both sets of weights.

    Raises `UsageError` when the two are not the same architecture, `PackageError` when the package
    cannot be read or run.
    """
    weights = PackageCheckpoint.open(package)
    check_same_model(weights, reference)
    tokenizer = check_tokenizer(package, reference, texts)
    ours, theirs, adapter = _with_adapter(package, weights, reference, swapped)
    if situations is None:
        situations = situations_of(shared_buffer=weights.ragged)
    evidence = gather(package, ours, theirs, asked, short, situations, progress, adapter)
    distance = compare_weights(weights, reference, _label("weights", progress))
    trained = _trained_length(reference)
    long = None
    if thorough:
        step = _label("the whole context", progress)
        long = measure_long(package, ours, theirs, asked.prompts, trained, step, adapter)
    measurements = (*_measurements(evidence), *_of_the_long(long))
    greedy = _greedy(evidence)
    values = {
        (m.error, m.situation, metric): value
        for m in measurements
        for metric, value in asdict(m.figures).items()
        if value is not None
    }
    values["weights", "", "steps"] = distance.steps
    rotary = rotary_error(ir.load(package / MODEL_FILE), weights.config)
    if rotary is not None:
        values["rotary", "", "max_abs"] = rotary.max_abs
    if distance.block_maximum is not None:
        values["weights", "", "block_maximum"] = distance.block_maximum
    values["greedy", "", "divergences"] = len(asked.prompts) - greedy[0].identical
    limits = thresholds(weights.precision, weights.activations, "cpu", max_kl)
    report = ParityReport(
        package=str(package),
        reference=" + ".join(map(str, (theirs.path, *adapters_of(theirs)))),
        precision=weights.precision,
        activations=weights.activations,
        provider=CPU.ort_name,
        positions=sum(len(passage.ids) for passage in evidence.shipped.passages),
        trained_length=trained,
        measurements=measurements,
        greedy=greedy,
        layers=evidence.layers,
        curves=tuple(_curves(evidence)),
        weights=distance,
        checks=check(limits, values),
        tokenizer=tokenizer,
        long=long,
        speed=evidence.shipped.speed,
        about=describe(package, reference.config.num_parameters(), _named_tokens(greedy)),
        passages=evidence.shipped.passages,
    )
    return report, evidence


def _with_adapter(
    package: Path,
    weights: PackageCheckpoint,
    reference: Checkpoint,
    swapped: tuple[str, Path] | None,
) -> tuple[Checkpoint, Checkpoint, Adapter | None]:
    """Both sets of weights with the adapter added, and its parameters as the package has them."""
    if swapped is None:
        return weights, reference, None
    name, folder = swapped
    parameters = read_parameters(ModelPackage.open(package).adapter_path(name))
    return open_adapter(weights, folder), open_adapter(reference, folder), parameters


def gather(
    package: Path,
    weights: Checkpoint,
    reference: Checkpoint,
    asked: Asked,
    short: Asked,
    situations: Sequence[Situation],
    progress: Progress | None = None,
    adapter: Adapter | None = None,
) -> Evidence:
    """Run the package as it ships, then its graph beside the two references."""
    label = _label("onnxruntime", progress)
    shipped = run_shipped(package, asked, short, situations, label, adapter)
    passages = shipped.passages
    # A session's own ways to run (threads, one buffer) mean nothing to a graph in pieces.
    plain = [s for s in situations if s.run is run_plainly]
    programs = [s.program(passages) for s in plain]
    names = [s.name for s, p in zip(plain, programs, strict=True) for _ in p]
    walked = (*passages, *shipped.short)
    stages = lockstep(package, weights, reference, walked, join(programs), adapter)
    layers, total = [], weights.config.num_hidden_layers + 2
    graph: dict[str, list[PositionFigures]] = {s.name: [] for s in plain}
    for done, stage in enumerate(stages):
        if stage.label == HEAD:
            choices = _measure_graph(stage, passages, names, graph)
            error = summarize(graph["prefill"]).relative_l2
        else:
            error = _relative_l2(
                (stage.dequantized[found.passage][found.positions], found.logits)
                for step, found in stage.graph
                if names[step] == "prefill"
            )
        lost = _relative_l2(zip(stage.original, stage.dequantized, strict=True))
        layers.append(LayerError(stage.label, error, lost))
        _label("layer by layer", progress)(done + 1, total)
    n = len(passages)
    return Evidence(
        shipped=shipped,
        dequantized=stage.dequantized[:n],
        original=stage.original[:n],
        short_dequantized=stage.dequantized[n:],
        short_original=stage.original[n:],
        graph=graph,
        graph_choices=choices,
        layers=tuple(layers),
    )


def _measure_graph(
    stage: Stage,
    passages: Sequence[Passage],
    names: Sequence[str],
    figures: dict[str, list[PositionFigures]],
) -> list[Ids]:
    """Add the figures of the graph's logits to those of their situation; returns the token [N]
    that the graph finds likeliest at each position of each passage, as last seen."""
    choices = [np.full(len(passage.ids), -1) for passage in passages]
    for step, found in stage.graph:
        targets = next_tokens(passages[found.passage])[found.positions]
        reference = stage.dequantized[found.passage][found.positions]
        figures[names[step]] += figures_in_pieces(reference, found.logits, targets)
        if names[step] == "decode":
            choices[found.passage][found.positions] = found.logits.argmax(axis=-1)
    return choices


def _relative_l2(pairs: Iterable[tuple[Float32, Float32]]) -> float:
    """||candidate - reference|| / ||reference|| over all pairs (reference, candidate)."""
    squares, reference_squares = 0.0, 0.0
    for reference, candidate in pairs:
        squares += float(np.square(candidate.astype(np.float64) - reference).sum())
        reference_squares += float(np.square(reference, dtype=np.float64).sum())
    return math.sqrt(squares / reference_squares) if reference_squares else math.nan


def _measurements(evidence: Evidence) -> Iterator[Measurement]:
    passages = evidence.shipped.passages
    for name, figures in evidence.graph.items():
        yield Measurement("graph", name, summarize(figures))
    for name, observations in evidence.shipped.observations.items():
        for error, reference in (
            ("shipped", evidence.dequantized),
            ("total", evidence.original),
        ):
            pairs = _pairs(passages, reference, observations)
            yield Measurement(error, name, compare(pairs))
    targets = [next_tokens(passage) for passage in passages]
    lost = compare(zip(evidence.original, evidence.dequantized, targets, strict=True))
    yield Measurement("quantization", "", lost)


def _of_the_long(long: LongContext | None) -> Iterator[Measurement]:
    for error, figures in long.figures.items() if long else ():
        yield Measurement(error, LONG_CONTEXT.name, figures)


def _named_tokens(greedy: Iterable[Greedy]) -> set[int]:
    parted = [d for one in greedy for d in one.divergences if d is not None]
    return {token for d in parted for token in (d.chosen, d.expected)}


def _pairs(
    passages: Sequence[Passage], reference: list[Float32], observations: Iterable[Observation]
) -> Iterator[tuple[Float32, Float32, Ids]]:
    for found in observations:
        targets = next_tokens(passages[found.passage])[found.positions]
        yield reference[found.passage][found.positions], found.logits, targets


def _curves(evidence: Evidence) -> Iterator[Curve]:
    observed = evidence.shipped.observations["prefill"]
    sides = {
        "quantization": list(enumerate(evidence.dequantized)),
        "total": [(found.passage, found.logits) for found in observed],
    }
    for error, candidates in sides.items():
        for index, logits in candidates:
            reference = evidence.original[index][-len(logits) :]
            nothing = np.full(len(logits), NO_TARGET)
            figures = list(figures_in_pieces(reference, logits, nothing))
            distance = [np.sqrt(f.squares / f.reference_squares) for f in figures]
            kl = np.concatenate([f.kl for f in figures])
            yield Curve(error, index, tuple(np.concatenate(distance).tolist()), tuple(kl.tolist()))


def _greedy(evidence: Evidence) -> tuple[Greedy, Greedy]:
    """Of the graph with fp32 activations, and of the package as it ships; see `Greedy`."""
    passages = evidence.shipped.passages
    chosen = [
        choices[p.prompt - 1 : -1]
        for p, choices in zip(passages, evidence.graph_choices, strict=True)
    ]
    written = [p.ids[p.prompt :] for p in passages]
    return (
        _teacher_forced("graph", passages, chosen, evidence.dequantized),
        _teacher_forced("shipped", passages, written, evidence.original),
    )


def _teacher_forced(
    name: str, passages: Sequence[Passage], tokens: list[Ids], reference: list[Float32]
) -> Greedy:
    divergences, agreeing = [], []
    for passage, chosen, logits in zip(passages, tokens, reference, strict=True):
        rows = logits[passage.prompt - 1 : -1]  # [n, V]: where the n tokens were chosen
        divergences.append(first_divergence(rows, chosen.tolist()))
        agreeing.append(rows.argmax(axis=-1) == chosen)  # [n]
    return Greedy(name, len(tokens[0]), float(np.mean(agreeing)), tuple(divergences))


def _trained_length(reference: Checkpoint) -> int | None:
    config, scaling = reference.config, reference.config.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "linear":  # which has no key for it
        return int(config.max_position_embeddings / scaling.factor)
    return scaling.original_max_position_embeddings


def _label(what: str, progress: Progress | None) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if progress:
            progress(what, done, total)

    return report
