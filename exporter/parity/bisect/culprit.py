"""Finds the first layer, and in it the first operator, whose result differs from PyTorch's.

Every piece of the graph is fed with the values of the *reference*, its cache included, so that an
error of one layer is not blamed on the next. Then each value that PyTorch has too is compared with
PyTorch's. The operator at fault is the one with a wrong output and right inputs. One layer is in
memory, with its inner values for one step.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.parity.bisect import points as pt
from llama_onnx.exporter.parity.bisect.deviation import Deviation, deviation
from llama_onnx.exporter.parity.bisect.points import Points, walk_points
from llama_onnx.exporter.parity.bisect.values import Point, expected, feeds_of, known_values
from llama_onnx.exporter.reference.constants import made_of_weights
from llama_onnx.exporter.reference.exact import compute_in_float32
from llama_onnx.exporter.reference.segments import Segment, moves_padding, open_segment, segments
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.situations import Passage, Program, Step
from llama_onnx.runtime.ort import Session
from llama_onnx.targets.graph_names import ATTENTION_MASK, INPUT_IDS, KEY, cache_part, is_past
from llama_onnx.targets.progress import Progress

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Culprit:
    """The piece of a graph that is wrong: all of `inputs` are right, `output` is not.

    `nodes` compute it: one node, or the few between two values that PyTorch has too. `points` are
    the points of all wrong outputs of the last node, that of `output` first. The arrays are those
    of step number `step`; where `expected` is NaN, the value may be anything. `seen` has the
    deviation of the output in each step.
    """

    stage: str
    points: tuple[Point, ...]
    output: str
    nodes: tuple[ir.Node, ...]
    step: int
    inputs: dict[str, Array]
    expected: Array
    found: Array
    seen: dict[int, Deviation]

    @property
    def node(self) -> ir.Node:
        """The node that computes the output."""
        (found,) = (n for n in self.nodes if any(v.name == self.output for v in n.outputs))
        return found

    @property
    def point(self) -> Point:
        """The point of the output."""
        return self.points[0]

    @property
    def deviation(self) -> Deviation:
        """The output's deviation in the step shown."""
        return self.seen[self.step]


def find_culprit(
    subject: Subject,
    passages: Sequence[Passage],
    program: Program,
    limit: float,
    exact: bool,
    progress: Progress,
) -> Culprit | None:
    """Return the first piece of the graph with a value that is off by more than `limit`, or None.

    `limit` is a relative L2 error over all positions; a single position may be off by ten times as
    much. `exact` as in `run_segments`.
    """
    weights, model = subject.weights, subject.load_graph()
    if exact:
        compute_in_float32(model, weights.config)
    known, padding_moves = known_values(model), moves_padding(model)
    environments: list[dict[str, Array]] = [
        {INPUT_IDS: step.ids, ATTENTION_MASK: step.mask} for step in program
    ]
    walked = walk_points(weights, [passage.ids for passage in passages])
    total = weights.config.num_hidden_layers + 2
    cuts = list(segments(model))
    for done, (segment, (label, points)) in enumerate(zip(cuts, walked, strict=True)):
        needed = {name for cut in cuts[done + 1 :] for name in cut.inputs}
        piece = _Piece(
            model, _with_every_value(segment, model), known, label, points, needed, padding_moves
        )
        session = open_segment(model, piece.segment, subject.path, exact=exact)
        culprit = piece.search(session, program, environments, limit)
        del session
        if culprit:
            return culprit
        progress.update("looking for the fault", done + 1, total)
    return None


@dataclass(frozen=True)
class _Piece:
    """A segment of the graph with all its values as outputs, and PyTorch's points of its stage.

    `needed` are the values that later segments read; `padding_moves` as in `moves_padding`.
    """

    model: ir.Model
    segment: Segment
    known: dict[str, Point]
    label: str
    points: list[Points]
    needed: Set[str]
    padding_moves: bool

    def search(
        self,
        session: Session,
        program: Program,
        environments: list[dict[str, Array]],
        limit: float,
    ) -> Culprit | None:
        """Run every step and search the first one that is off; store the reference's values for
        later segments in `environments`."""
        culprit: Culprit | None = None
        seen: dict[str, dict[int, Deviation]] = {}
        for index, (step, environment) in enumerate(zip(program, environments, strict=True)):
            feeds = self._feeds(step, environment)
            names = list(self.segment.outputs)
            values = dict(zip(names, session.run(names, feeds), strict=True))
            right = {name: self._expected(name, values[name].shape, step) for name in values
                     if name in self.known}  # fmt: skip
            off = {n: deviation(e, values[n], limit) for n, e in right.items()}
            for name, how in off.items():
                seen.setdefault(name, {})[index] = how
            wrong = {name for name, how in off.items() if not how.within(limit)}
            if wrong and culprit is None:
                culprit = self._blame(wrong, index, feeds | values, right)
            found = {n: _like(right.get(n), value) for n, value in values.items()}
            environments[index] = {
                n: v for n, v in (environment | found).items() if n in self.needed
            }
        return culprit and replace(culprit, seen=seen[culprit.output])

    def _expected(self, name: str, shape: tuple[int, ...], step: Step) -> Array:
        return expected(self.known[name], shape, step, self.points)

    def _feeds(self, step: Step, environment: dict[str, Array]) -> dict[str, Array]:
        """Return the reference's values, with its cache cut at the beginning of the step."""
        feeds = {}
        dtypes = {v.name: v.dtype.numpy() for v in self.model.graph.inputs if v.dtype}
        for name in self.segment.inputs:
            if is_past(name):
                part = pt.KEY if cache_part(name) == KEY else pt.VALUE
                past = _past(part, step, self.points, self.padding_moves)
                feeds[name] = past.astype(dtypes[name])
            else:
                feeds[name] = environment[name]
        return feeds

    def _blame(
        self, wrong: set[str], index: int, values: dict[str, Array], right: dict[str, Array]
    ) -> Culprit:
        """Go back from any wrong value to one that is computed only from right values."""
        producers = {str(v.name): node for node in self.segment.nodes for v in node.outputs}
        name = next(n for n in self.segment.outputs if n in wrong)
        while True:
            nodes, inputs = self._cone(name, producers)
            earlier = next((n for n in inputs if n in wrong), None)
            if earlier is None:
                break
            name = earlier
        outputs = (str(value.name) for value in producers[name].outputs)
        siblings = [n for n in outputs if n in wrong and n != name]
        return Culprit(
            self.label,
            tuple(self.known[n] for n in [name, *siblings]),
            name,
            tuple(node for node in self.model.graph if node in nodes),
            index,
            {n: values[n] for n in inputs},
            right[name],
            values[name],
            {},
        )

    def _cone(self, name: str, producers: dict[str, ir.Node]) -> tuple[set[ir.Node], list[str]]:
        """Return the nodes that compute value `name` from known values or inputs of the segment,
        and the names of those. What is made of weights alone counts as weights."""
        nodes, inputs, pending = set(), list[str](), [producers[name]]
        constant = made_of_weights(self.model.graph)
        while pending:
            node = pending.pop()
            nodes.add(node)
            for value in node.inputs:
                if value is None or value.name in self.model.graph.initializers:
                    continue
                if value in constant:
                    continue
                maker = producers.get(str(value.name))
                if value.name in self.known or maker is None:
                    inputs.append(str(value.name))
                elif maker not in nodes:
                    pending.append(maker)
        return nodes, list(dict.fromkeys(inputs))


def _with_every_value(segment: Segment, model: ir.Model) -> Segment:
    """Return `segment` with every value as an output, except those computed only from weights."""
    constant = made_of_weights(model.graph)
    used = (v for node in segment.nodes for v in node.outputs if v.uses() and v not in constant)
    names = dict.fromkeys([*(str(value.name) for value in used), *segment.outputs])
    return replace(segment, outputs=tuple(names))


def _past(part: str, step: Step, passages: Sequence[Points], padding_moves: bool) -> Array:
    """Return the keys or values [B, kv_heads, past, head_dim] of all positions before `step`: each
    row's first if the graph moves padding, otherwise where the caller had its tokens."""
    batch, length = step.ids.shape
    _, heads, dim = passages[0][part].shape
    past = np.zeros((batch, heads, step.mask.shape[1] - length, dim), np.float32)
    for feed in feeds_of(step):
        cached = passages[feed.passage][part][: feed.begin]  # [n, kv_heads, head_dim]
        places = np.arange(feed.begin)
        if not padding_moves:
            places = np.flatnonzero(step.mask[feed.batch, : past.shape[2]])
        past[feed.batch, :, places] = cached
    return past


def _like(right: Array | None, found: Array) -> Array:
    """Return the reference's value `right`, and `found` where it has none (None or NaN)."""
    if right is None:
        return found
    return np.where(np.isnan(right), found, right).astype(found.dtype)
