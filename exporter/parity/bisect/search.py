"""Finds the piece of a package that makes it miss a threshold.

The weights come first, tensor by tensor, then the rotary tables. If both are right, the graph is
searched with fp32 activations, in the situations that missed, and then with the activations it
ships with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_onnx.exporter.parity.bisect.culprit import Culprit, find_culprit
from llama_onnx.exporter.parity.bisect.deviation import deviation, ranges
from llama_onnx.exporter.parity.bisect.location import graph_location, weights_location
from llama_onnx.exporter.parity.bisect.reproduce import cut_out, run_piece, write_reproduction
from llama_onnx.exporter.parity.bisect.values import layer_of, module_of, scope_of
from llama_onnx.exporter.parity.bisect.wrong_weights import (
    Limits,
    WrongWeights,
    find_wrong_weights,
    probe,
)
from llama_onnx.exporter.parity.measure.long import PIECE, in_pieces, long_passage
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.measure.rotary import rotary_error, rotating_nodes, rotation_at
from llama_onnx.exporter.reference.exact import compute_in_float32
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.situations import (
    DECODE,
    LONG_CONTEXT,
    SITUATIONS,
    Passage,
    Program,
    join,
    run_plainly,
)
from llama_onnx.targets.progress import SILENT, Progress


@dataclass(frozen=True)
class Finding:
    """The piece that is at fault.

    `cause` is "weights", "rotary" (tables), "graph", or "activations" (the graph, but only with
    the activations it ships with). `layer` is "embedding", "layer 0", ..., "head"; `module` and
    `value` have PyTorch's names. `op` is the node with the wrong output; `others` are the nodes
    between it and the nearest right values, one of which may be at fault instead. `relative_l2`
    and `max_abs` are the errors of the output in `situation` ("" for weights and tables). `where`
    describes the location of the error; `reproduction` is the folder that shows it.
    """

    cause: str
    layer: str
    module: str
    value: str
    op: str
    op_type: str
    others: tuple[str, ...]
    situation: str
    relative_l2: float
    max_abs: float
    where: tuple[str, ...]
    reproduction: str

    def sentence(self) -> str:
        """Return layer, module and op."""
        return f"{self.layer}, {self.module}: {self.op_type} ({self.op})"


@dataclass(frozen=True)
class Bisection:
    """What was found, or in `note` why nothing was."""

    finding: Finding | None
    note: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the figures may be NaN."""
        return asdict(self)


def bisect(
    subject: Subject, report: ParityReport, out: Path, progress: Progress = SILENT
) -> Bisection:
    """Find what made `report` miss its thresholds, and write it to the folder `out`.

    `subject` is what `report` is about; an active adapter is ignored.
    """
    missed = [check for check in report.checks if not check.passed]
    measures = {check.threshold.measure for check in missed}
    if "weights" in measures:
        wrong = find_wrong_weights(subject.weights, subject.rounded_from, _weight_limits(report))
        if wrong:
            return Bisection(_report_weights(subject, wrong, out), "")
    if "rotary" in measures:
        return Bisection(_report_rotary(subject, report, out), "")
    for cause, causes in (("graph", ("graph", "greedy")), ("activations", ("shipped",))):
        names = {c.situation for c in missed if c.threshold.measure in causes}
        if names:
            search = _search(subject, report, cause, names)
            culprit = search.run(progress)
            if culprit:
                return Bisection(_report_culprit(search, culprit, out), "")
    return Bisection(None, _note(report, measures))


def _note(report: ParityReport, measures: set[str]) -> str:
    if report.passed:
        return "every threshold holds, so there is nothing to look for."
    if measures & {"graph", "greedy", "shipped"}:
        return (
            "no piece of the graph is wrong when it is fed PyTorch's values; either rounding "
            "errors add up over the layers, or only a whole session shows the fault."
        )
    if measures:
        return (
            f"only {' and '.join(sorted(measures))} missed a limit, and every rounded weight "
            "contributes to that; the weights are rounded correctly, and the graph is right."
        )
    return "the graph and the weights are right, so the tokenizer or another file is wrong."


@dataclass(frozen=True)
class _Search:
    """Where to look for a fault in the graph: `program` has the steps of all situations, and
    `situations` names the one that each step belongs to."""

    subject: Subject
    cause: str
    limit: float
    passages: Sequence[Passage]
    program: Program
    situations: Sequence[str]

    @property
    def exact(self) -> bool:
        return self.cause == "graph"

    def run(self, progress: Progress) -> Culprit | None:
        return find_culprit(
            self.subject, self.passages, self.program, self.limit, self.exact, progress
        )


def _search(subject: Subject, report: ParityReport, cause: str, names: set[str]) -> _Search:
    """Plan a search in the situations called `names`. Situations that only a whole session can run
    are replaced by "token by token"."""
    # The error of one piece must not exceed what the whole graph is allowed.
    measure = "graph" if cause == "graph" else "shipped"
    rows = (check.threshold for check in report.checks)
    limit = min(t.limit for t in rows if (t.measure, t.metric) == (measure, "relative_l2"))
    passages = report.passages
    if names == {LONG_CONTEXT.name}:
        prompts = [passage.ids[: passage.prompt] for passage in passages]
        passages = (long_passage(prompts, subject.weights.config.max_position_embeddings),)
        program = in_pieces(LONG_CONTEXT.program(passages), PIECE)
        meanings = [LONG_CONTEXT.meaning] * len(program)
    else:
        chosen = [s for s in SITUATIONS if s.name in names and s.run is run_plainly] or [DECODE]
        programs = [s.program(passages) for s in chosen]
        program = join(programs)
        meanings = [s.meaning for s, p in zip(chosen, programs, strict=True) for _ in p]
    return _Search(subject, cause, limit, passages, program, meanings)


def _weight_limits(report: ParityReport) -> Limits:
    rows = [c.threshold for c in report.checks if c.threshold.measure == "weights"]
    return Limits(**{row.metric: row.limit for row in rows})


def _report_weights(subject: Subject, wrong: WrongWeights, out: Path) -> Finding:
    model = subject.load_graph()
    compute_in_float32(model, subject.weights.config)
    shown = probe(model, wrong, subject.weights, subject.rounded_from)
    node = shown.nodes[-1]
    piece = cut_out(model, shown.inputs, shown.output)
    found = run_piece(piece, shown.inputs, subject.path)
    title = f"{wrong.tensor} differs from its original, as {node.op_type} shows."
    write_reproduction(out, piece, shown.inputs, shown.expected, found, title)
    how = deviation(shown.expected, found, 0)
    return Finding(
        "weights",
        _layer_of(wrong.tensor),
        wrong.tensor.removesuffix(".weight").partition("layers.")[2].partition(".")[2]
        or wrong.tensor.removesuffix(".weight").removeprefix("model."),
        wrong.tensor,
        str(node.name),
        node.op_type,
        tuple(str(n.name) for n in shown.nodes[:-1]),
        "",
        how.relative_l2,
        how.max_abs,
        tuple(weights_location(wrong)),
        str(out),
    )


def _layer_of(tensor: str) -> str:
    if tensor.startswith("model.layers."):
        return f"layer {tensor.split('.')[2]}"
    return "embedding" if "embed_tokens" in tensor else "head"


def _report_rotary(subject: Subject, report: ParityReport, out: Path) -> Finding:
    """Rotate some keys at the first position whose angles are wrong."""
    model, config = subject.load_graph(), subject.weights.config
    (limit,) = (c.threshold.limit for c in report.checks if c.threshold.measure == "rotary")
    error = rotary_error(model, config, limit)
    assert error is not None and error.positions, "the report has a rotary error"
    position = error.positions[0]
    readers = [
        node
        for node, tables in rotating_nodes(model).items()
        if error.initializer in (table.name for table in tables)
    ]
    layers = {layer_of(reader) for reader in readers}
    node = readers[0]
    shown = rotation_at(node, position, config)
    inputs, expected = shown.inputs, shown.expected
    piece = cut_out(model, inputs, shown.output)
    found = run_piece(piece, inputs, subject.path)
    title = f"Keys rotated at position {position}: the {error.table} table is wrong there."
    write_reproduction(out, piece, inputs, expected, found, title)
    how = deviation(expected, found, 0)
    return Finding(
        "rotary",
        layer_of(node),
        module_of(node),
        error.initializer,
        str(node.name),
        node.op_type,
        (),
        "",
        how.relative_l2,
        how.max_abs,
        (
            f"positions {ranges(error.positions)} of 0-{config.max_position_embeddings - 1}",
            f"in {len(layers)} of {config.num_hidden_layers} layers",
        ),
        str(out),
    )


def _report_culprit(search: _Search, culprit: Culprit, out: Path) -> Finding:
    model, config = search.subject.load_graph(), search.subject.weights.config
    if search.exact:
        compute_in_float32(model, config)
    node = culprit.node
    situation = search.situations[culprit.step]
    title = f"{node.op_type} ({node.name}) does not compute what PyTorch does: {situation}."
    piece = cut_out(model, culprit.inputs, culprit.output)
    write_reproduction(out, piece, culprit.inputs, culprit.expected, culprit.found, title)
    return Finding(
        search.cause,
        culprit.stage,
        module_of(node) or scope_of(node) or "padding",
        ", ".join(point.name for point in culprit.points),
        str(node.name),
        node.op_type,
        tuple(str(n.name) for n in culprit.nodes if n is not node),
        situation,
        culprit.deviation.relative_l2,
        culprit.deviation.max_abs,
        tuple(graph_location(culprit, search.program, config)),
        str(out),
    )
