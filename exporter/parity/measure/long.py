"""Measures the whole context: at positions 2047 to 2049 and up to its end, in bounded memory.

A passage this long has gigabytes of logits, so the references compute those of a few positions
only, and no step has more than `PIECE` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.reference.lockstep import HEAD, lockstep
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.graph_session import GraphSession
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
"""Maximum tokens of one step: all logits of a step are in memory at once."""


@dataclass(frozen=True)
class LongPosition:
    """The errors at one position; `beyond_training` is whether it exceeds the trained length.

    `graph` and `shipped` are the relative L2 error of the logits against the package's weights,
    `kl` (nats) is the divergence of the package as it ships from the original weights.
    """

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
    """Repeat `prompts` until they fill a context of `length`."""
    return Passage(np.resize(np.concatenate(prompts), length), length)


def measure_long(
    subject: Subject,
    prompts: Sequence[Ids],
    trained_length: int | None,
    progress: Progress,
) -> LongContext:
    """Run LONG_CONTEXT on `prompts`, repeated until the context is full."""
    length = subject.weights.config.max_position_embeddings
    passage = long_passage(prompts, length)
    program = in_pieces(LONG_CONTEXT.program([passage]), PIECE)
    situation = replace(LONG_CONTEXT, program=lambda _: program)
    session = GraphSession.open(subject.path, subject.adapter)
    shipped = list(try_situation(situation, session, [passage]))
    del session
    positions = np.concatenate([found.positions for found in shipped])
    total = subject.weights.config.num_hidden_layers + 2
    for done, stage in enumerate(lockstep(subject, [passage], program, [positions])):
        if stage.label == HEAD:
            graph = [found for _, found in stage.graph]
            (original,), (package,) = stage.original, stage.package
        progress.update("the whole context", done + 1, total)
    sides = {
        "graph": (package, _logits(graph)),
        "shipped": (package, _logits(shipped)),
        "total": (original, _logits(shipped)),
    }
    targets = np.append(passage.ids[1:], NO_TARGET)[positions]
    return LongContext(
        length,
        tuple(_by_position(sides, positions, trained_length)),
        {error: compare([(*pair, targets)]) for error, pair in sides.items()},
    )


def in_pieces(program: Program, longest: int) -> Program:
    """Split each step of `program` with more than `longest` tokens; only the last part is observed.

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
    no_target = np.full(1, NO_TARGET)
    for index, position in enumerate(positions.tolist()):
        row = {
            error: summarize(
                [position_figures(r[index : index + 1], c[index : index + 1], no_target)]
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
