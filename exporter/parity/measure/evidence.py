"""The logits that every figure is computed from: the package's session, its graph, two references.

One session, or one layer of each model, is in memory at a time, besides the logits themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.parity.measure.loss import Lost, measure_loss
from llama_onnx.exporter.parity.measure.report import LayerError
from llama_onnx.exporter.parity.measure.shipped import PromptSet, Shipped, run_shipped
from llama_onnx.exporter.parity.measure.stages import Stages
from llama_onnx.exporter.reference.lockstep import HEAD, Stage, lockstep
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.certificate import next_tokens
from llama_onnx.runtime.measure.metrics import (
    Ids,
    PositionFigures,
    figures_in_pieces,
    summarize,
)
from llama_onnx.runtime.measure.situations import Passage, Situation, merge, run_plainly
from llama_onnx.targets.progress import SILENT, Progress


@dataclass(frozen=True)
class Evidence:
    """The result of every run.

    Logits are float32 [N, V], one array for each passage: `package_logits` are PyTorch's with the
    package's weights, `original_logits` PyTorch's with the original weights, and those that begin
    with `certificate_` belong to the passages of the certificate.

    `graph` has the figures of the graph with fp32 activations in each situation, `graph_choices`
    the token [N] that it finds likeliest at each position of each passage. `lost` is the loss on
    the evaluation text, None without one. `seconds` is how long each stage took.
    """

    shipped: Shipped
    package_logits: list[Float32]
    original_logits: list[Float32]
    certificate_package_logits: list[Float32]
    certificate_original_logits: list[Float32]
    graph: dict[str, list[PositionFigures]]
    graph_choices: list[Ids]
    layers: tuple[LayerError, ...]
    lost: Lost | None
    seconds: dict[str, float]


def gather(
    subject: Subject,
    prompts: PromptSet,
    certificate_prompts: PromptSet,
    situations: Sequence[Situation],
    evaluation: Sequence[Ids] = (),
    progress: Progress = SILENT,
) -> Evidence:
    """Run the package as it ships, then its graph in lockstep with the two references."""
    stages = Stages()
    with stages.timed("shipped"):
        shipped = run_shipped(
            subject, prompts, certificate_prompts, evaluation, situations, progress
        )
    passages = shipped.passages
    # Threads and a shared buffer belong to a whole session: a graph in pieces has neither.
    plain = [s for s in situations if s.run is run_plainly]
    program, owners = merge([s.program(passages) for s in plain])
    names = [tuple(plain[number].name for number in numbers) for numbers in owners]
    compared = (*passages, *shipped.certificate_passages)
    walked = (*compared, *shipped.evaluation_passages)
    layers, total = [], subject.weights.config.num_hidden_layers + 2
    graph: dict[str, list[PositionFigures]] = {s.name: [] for s in plain}
    for done, stage in enumerate(lockstep(subject, walked, program, watch=stages.each)):
        if stage.label == HEAD:
            choices = _measure_graph(stage, passages, names, graph)
            error = summarize(graph["prefill"]).relative_l2
        else:
            error = _graph_error(stage, names)
        both = zip(stage.original, stage.package, strict=True)
        with stages.timed("figures"):
            quantization = _relative_l2(islice(both, len(compared)))
        layers.append(LayerError(stage.label, error, quantization))
        progress.update("layer by layer", done + 1, total)
    n, end = len(passages), len(compared)
    with stages.timed("figures"):
        lost = _lost(shipped, stage, end)
    return Evidence(
        shipped=shipped,
        package_logits=stage.package[:n],
        original_logits=stage.original[:n],
        certificate_package_logits=stage.package[n:end],
        certificate_original_logits=stage.original[n:end],
        graph=graph,
        graph_choices=choices,
        layers=tuple(layers),
        lost=lost,
        seconds=stages.seconds,
    )


def _lost(shipped: Shipped, head: Stage, start: int) -> Lost | None:
    """Return the loss on the evaluation text, whose passages begin at number `start`."""
    if not shipped.evaluation:
        return None
    read = shipped.evaluation_passages
    return measure_loss(read, head.original[start:], head.package[start:], shipped.evaluation)


def _graph_error(stage: Stage, names: Sequence[tuple[str, ...]]) -> float:
    """Return the relative L2 of the graph's hidden states in one pass. `names` are the situations
    of each step."""
    return _relative_l2(
        (stage.package[found.passage][found.positions], found.logits)
        for step, found in stage.graph
        if "prefill" in names[step]
    )


def _measure_graph(
    stage: Stage,
    passages: Sequence[Passage],
    names: Sequence[tuple[str, ...]],
    figures: dict[str, list[PositionFigures]],
) -> list[Ids]:
    """Add the figures of the graph's logits to those of their situation; return the token [N] that
    the graph finds likeliest at each position of each passage, token by token."""
    choices = [np.full(len(passage.ids), -1) for passage in passages]
    for step, found in stage.graph:
        targets = next_tokens(passages[found.passage])[found.positions]
        reference = stage.package[found.passage][found.positions]
        pieces = list(figures_in_pieces(reference, found.logits, targets))
        for name in names[step]:
            figures[name] += pieces
        if "decode" in names[step]:
            choices[found.passage][found.positions] = found.logits.argmax(axis=-1)
    return choices


def _relative_l2(pairs: Iterable[tuple[Float32, Float32]]) -> float:
    """Return ||candidate - reference|| / ||reference|| over all pairs (reference, candidate)."""
    squares, reference_squares = 0.0, 0.0
    for reference, candidate in pairs:
        squares += float(np.square(candidate.astype(np.float64) - reference).sum())
        reference_squares += float(np.square(reference, dtype=np.float64).sum())
    return math.sqrt(squares / reference_squares) if reference_squares else math.nan
