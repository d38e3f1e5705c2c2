"""Three models side by side, one layer of each in memory: the original one, PyTorch on the
package's own weights, and the package's graph with float32 activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.reference.segments import moves_padding, run_segments
from llama_onnx.runtime.measure.graph_session import Adapter
from llama_onnx.runtime.measure.metrics import Ids
from llama_onnx.runtime.measure.situations import Observation, Passage, Program, Row, Step, observe
from llama_onnx.targets.graph_names import LOGITS
from llama_onnx.targets.package import MODEL_FILE

HEAD = "head"


@dataclass(frozen=True)
class Stage:
    """What all three make of the passages behind one stage: "embedding", "layer 0", ..., "head".

    `original` and `dequantized` have a state [N, H] for each passage (behind the head: logits
    [N, V]). `graph` yields the same of the graph, as observations, with the index of the step of
    the program that they belong to.
    """

    label: str
    original: list[Float32]
    dequantized: list[Float32]
    graph: Iterator[tuple[int, Observation]]


def lockstep(
    package: Path,
    weights: Checkpoint,
    original: Checkpoint,
    passages: Sequence[Passage],
    program: Program,
    adapter: Adapter | None = None,
    positions: Sequence[Ids] | None = None,
) -> Iterator[Stage]:
    """Walk all three models through `passages`; the graph is fed as `program` says, and has
    `adapter` active. Given `positions` [n] of each passage, both references' logits are those
    there alone."""
    # Imported here: PyTorch has no business in memory while a whole session is.
    from llama_onnx.exporter.reference.walk import walk_layers

    sequences = [passage.ids for passage in passages]
    in_front = moves_padding(ir.load(package / MODEL_FILE))
    for (label, theirs), (_, ours), (segment, steps) in zip(
        walk_layers(original, sequences, positions),
        walk_layers(weights, sequences, positions),
        run_segments(package / MODEL_FILE, program, weights.config, exact=True, adapter=adapter),
        strict=True,
    ):
        assert segment == label
        yield Stage(label, theirs, ours, _observations(program, steps, in_front))


def _observations(
    program: Program, steps: Iterator[dict[str, npt.NDArray[Any]]], in_front: bool
) -> Iterator[tuple[int, Observation]]:
    for index, (step, outputs) in enumerate(zip(program, steps, strict=True)):
        if LOGITS in outputs:
            found = observe(step, outputs[LOGITS])
        else:
            hidden = hidden_state(outputs)
            found = (hidden_observation(step, row, hidden, in_front) for row in step.rows)
        yield from ((index, observation) for observation in found)


def hidden_state(outputs: dict[str, npt.NDArray[Any]]) -> Float32:
    """The hidden state [B, S, H] among a segment's outputs: x, or x and the residual beside it."""
    parts = [
        value for name, value in outputs.items() if value.ndim == 3 and value.dtype == np.float32
    ]
    return np.asarray(np.sum(parts, axis=0, dtype=np.float32))


def hidden_observation(step: Step, row: Row, hidden: Float32, in_front: bool) -> Observation:
    """What `row` says about `hidden` [B, S, H], in which valid positions stand `in_front`, or where
    the caller put them."""
    length = step.ids.shape[1]
    # On the left, rotated away.
    padding = int(step.mask[row.batch, -length:].argmax()) if in_front else 0
    start, stop, _ = row.outputs.indices(length)
    positions = np.arange(row.first, row.first + stop - start)
    return Observation(row.passage, positions, hidden[row.batch, start - padding : stop - padding])
