"""Runs three models in lockstep, with one layer of each in memory: PyTorch with the original
weights, PyTorch with the package's weights, and the package's graph with float32 activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.reference.segments import run_segments
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.metrics import Ids
from llama_onnx.runtime.measure.situations import Observation, Passage, Program, Row, Step, observe
from llama_onnx.targets.graph_names import LOGITS

HEAD = "head"

_T = TypeVar("_T")


class Watch(Protocol):
    """Yields the items of an iterator, those of one of the three models called `name`."""

    def __call__(self, name: str, items: Iterator[_T], /) -> Iterator[_T]:
        """Return an iterator over the same items."""


def unwatched(name: str, items: Iterator[_T]) -> Iterator[_T]:
    """Yield `items`."""
    return items


@dataclass(frozen=True)
class Stage:
    """The values of the three models after one stage: "embedding", "layer 0", ..., "head".

    `original` (PyTorch with the original weights) and `package` (PyTorch with the package's
    weights) have a hidden state [N, H] for each passage; after the head, logits [N, V]. `graph`
    yields the graph's values as observations, each with the index of its step in the program.
    """

    label: str
    original: list[Float32]
    package: list[Float32]
    graph: Iterator[tuple[int, Observation]]


def lockstep(
    subject: Subject,
    passages: Sequence[Passage],
    program: Program,
    positions: Sequence[Ids] | None = None,
    watch: Watch = unwatched,
) -> Iterator[Stage]:
    """Yield each stage of the three models of `subject` on `passages`; `program` feeds the graph.

    With `positions`, [n] for each passage, the PyTorch models compute logits only there. `watch`
    sees what each model yields: "original", "package" or "graph".
    """
    # Imported here: PyTorch and a session of the whole graph must not be in memory together.
    from llama_onnx.exporter.reference.walk import walk_layers

    sequences = [passage.ids for passage in passages]
    weights, config = subject.weights, subject.weights.config
    graph = run_segments(subject.model_path, program, config, exact=True, adapter=subject.adapter)
    for (label, original), (_, package), (segment, steps) in zip(
        watch("original", walk_layers(subject.adapted_original, sequences, positions)),
        watch("package", walk_layers(subject.adapted_weights, sequences, positions)),
        watch("graph", graph),
        strict=True,
    ):
        assert segment == label
        found = _observations(program, watch("graph", steps), moves_padding=weights.ragged)
        yield Stage(label, original, package, found)


def _observations(
    program: Program, steps: Iterator[dict[str, npt.NDArray[Any]]], *, moves_padding: bool
) -> Iterator[tuple[int, Observation]]:
    for index, (step, outputs) in enumerate(zip(program, steps, strict=True)):
        if LOGITS in outputs:
            found = observe(step, outputs[LOGITS])
        else:
            hidden = _hidden_state(outputs)
            found = (
                _hidden_observation(step, row, hidden, moves_padding=moves_padding)
                for row in step.rows
            )
        yield from ((index, observation) for observation in found)


def _hidden_state(outputs: dict[str, npt.NDArray[Any]]) -> Float32:
    """Return the hidden state [B, S, H] in a segment's outputs: x, or x plus the residual."""
    parts = [
        value for name, value in outputs.items() if value.ndim == 3 and value.dtype == np.float32
    ]
    return np.asarray(np.sum(parts, axis=0, dtype=np.float32))


def _hidden_observation(
    step: Step, row: Row, hidden: Float32, *, moves_padding: bool
) -> Observation:
    """Return the observation of `row` in `hidden` [B, S, H]. A graph that moves padding has each
    row's valid positions first; any other graph leaves them where the caller put them."""
    length = step.ids.shape[1]
    padding = int(step.mask[row.batch, -length:].argmax()) if moves_padding else 0  # on the left
    start, stop, _ = row.outputs.indices(length)
    positions = np.arange(row.first, row.first + stop - start)
    return Observation(row.passage, positions, hidden[row.batch, start - padding : stop - padding])
