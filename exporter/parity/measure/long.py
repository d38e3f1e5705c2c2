"""The whole context, once: past 2047, 2048 and 2049 and up to its end, in bounded memory.

A passage this long has logits of gigabytes, so the references give those at the few positions
that are looked at, and nobody is fed more than `PIECE` tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.reference.lockstep import HEAD, lockstep
from llama_onnx.runtime.measure.graph_session import Adapter, GraphSession
from llama_onnx.runtime.measure.metrics import (
    NO_TARGET,
    Comparison,
    Ids,
    compare,
    position_figures,
    summarize,
)
from llama_onnx.runtime.measure.situations import (
    LONG_CONTEXT,
    Observation,
    Passage,
    Program,
    Step,
    try_situation,
)
from llama_onnx.targets.progress import Progress

PIECE = 512
"""Tokens of one step at most: a step's logits are all there at once."""


@dataclass(frozen=True)
class LongPosition:
    """One position that was looked at; `beyond_training` names those the model was never trained
    on. `graph` and `shipped` are the relative L2 of the logits to those of the package's weights,
    `kl` (nats) is that of the package as it ships to the original."""

    position: int
    beyond_training: bool
    graph: float
    shipped: float
    kl: float


@dataclass(frozen=True)
class LongContext:
    """The figures over all of `positions`, for each of the errors "graph", "shipped", "total"."""

    length: int
    positions: tuple[LongPosition, ...]
    figures: dict[str, Comparison]


def long_passage(prompts: Sequence[Ids], length: int) -> Passage:
    """`prompts` repeated until they fill a context of `length`."""
    return Passage(np.resize(np.concatenate(prompts), length), length)


def measure_long(
    package: Path,
    weights: Checkpoint,
    reference: Checkpoint,
    prompts: Sequence[Ids],
    trained_length: int | None,
    progress: Progress,
    adapter: Adapter | None = None,
) -> LongContext:
    """Run LONG_CONTEXT on `prompts` repeated until the context is full."""
    length = reference.config.max_position_embeddings
    passage = long_passage(prompts, length)
    program = in_pieces(LONG_CONTEXT.program([passage]), PIECE)
    situation = replace(LONG_CONTEXT, program=lambda _: program)
    shipped = list(try_situation(situation, GraphSession.open(package, adapter), [passage]))
    positions = np.concatenate([found.positions for found in shipped])
    total = weights.config.num_hidden_layers + 2
    stages = lockstep(package, weights, reference, [passage], program, adapter, [positions])
    for done, stage in enumerate(stages):
        if stage.label == HEAD:
            graph = [found for _, found in stage.graph]
            (original,), (ours,) = stage.original, stage.dequantized
        progress.update("the whole context", done + 1, total)
    sides = {
        "graph": (ours, _logits(graph)),
        "shipped": (ours, _logits(shipped)),
        "total": (original, _logits(shipped)),
    }
    targets = np.append(passage.ids[1:], NO_TARGET)[positions]
    return LongContext(
        length,
        tuple(_by_position(sides, positions, trained_length)),
        {error: compare([(*pair, targets)]) for error, pair in sides.items()},
    )


def in_pieces(program: Program, longest: int) -> Program:
    """The same, each step of more than `longest` tokens in several, of which the last is looked at.

    For programs of one conversation, in which every step follows the one before it.
    """
    pieces: list[Step] = []
    for step in program:
        length, before = step.ids.shape[1], step.mask.shape[1] - step.ids.shape[1]
        for start in range(0, length, longest):
            stop = min(start + longest, length)
            piece = replace(
                step,
                ids=step.ids[:, start:stop],
                mask=step.mask[:, : before + stop],
                past=len(pieces) - 1 if pieces else None,
                rows=step.rows if stop == length else (),
            )
            pieces.append(piece)
    return pieces


def _logits(observations: Sequence[Observation]) -> Float32:
    return np.concatenate([found.logits for found in observations])


def _by_position(
    sides: dict[str, tuple[Float32, Float32]], positions: Ids, trained_length: int | None
) -> Iterator[LongPosition]:
    nothing = np.full(1, NO_TARGET)
    for index, position in enumerate(positions.tolist()):
        row = {
            error: summarize(
                [position_figures(r[index : index + 1], c[index : index + 1], nothing)]
            )
            for error, (r, c) in sides.items()
        }
        yield LongPosition(
            position,
            trained_length is not None and position >= trained_length,
            row["graph"].relative_l2,
            row["shipped"].relative_l2,
            row["total"].mean_kl,
        )
