"""The package as it ships, run by plain onnxruntime in every situation.

This is the only time that a whole session is in memory, and PyTorch is not loaded yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from llama_onnx.runtime.measure.graph_session import Adapter, GraphSession
from llama_onnx.runtime.measure.metrics import Ids
from llama_onnx.runtime.measure.situations import (
    Observation,
    Passage,
    Situation,
    looks_everywhere,
    try_situation,
)
from llama_onnx.runtime.measure.speed import Speed, measure_speed
from llama_onnx.runtime.memory import give_back_what_is_freed

_KEPT = 24  # positions of one observation that are kept, where not all of them are


@dataclass(frozen=True)
class Asked:
    """Prompts (ids [P] each) to continue greedily by `tokens`, 2 or more: the first comes out of
    the prefill, the others are decoded."""

    prompts: Sequence[Ids]
    tokens: int


NOTHING = Asked((), 0)


@dataclass(frozen=True)
class Shipped:
    """Prompts with the tokens that follow them greedily, what the graph said on its way, and how
    fast it was on the longest of them. `short` are those for the certificate, continued only."""

    passages: tuple[Passage, ...]
    short: tuple[Passage, ...]
    observations: dict[str, list[Observation]]
    speed: Speed


def run_shipped(
    package: Path,
    asked: Asked,
    short: Asked,
    situations: Sequence[Situation],
    progress: Callable[[int, int], None],
    adapter: Adapter | None = None,
) -> Shipped:
    """Continue the prompts of both, then try every situation on those of the first."""
    graph = GraphSession.open(package, adapter)
    total = 2 + len(situations)
    passages = _continue(graph, asked)
    progress(1, total)
    continued = _continue(graph, short)
    progress(2, total)
    observations = {}
    for index, situation in enumerate(situations):
        found = try_situation(situation, graph, passages)
        kept = found if looks_everywhere(situation) else map(_thin, found)
        observations[situation.name] = _on_disk(kept)
        give_back_what_is_freed()
        progress(3 + index, total)
    longest = max(passages, key=lambda passage: passage.prompt)
    speed = measure_speed(graph, longest.ids, longest.prompt)
    return Shipped(passages, continued, observations, speed)


def _continue(graph: GraphSession, asked: Asked) -> tuple[Passage, ...]:
    following = (graph.greedy(prompt, asked.tokens) for prompt in asked.prompts)
    passages = tuple(
        Passage(np.concatenate([prompt, np.array(tokens, np.int64)]), len(prompt))
        for prompt, tokens in zip(asked.prompts, following, strict=True)
    )
    give_back_what_is_freed()
    return passages


def _on_disk(found: Iterable[Observation]) -> list[Observation]:
    """The same observations, their logits in one file without a name that goes with the last."""
    seen: list[tuple[int, Ids]] = []
    with TemporaryFile() as file:
        for observation in found:
            logits = observation.logits  # [n, V]
            seen.append((observation.passage, observation.positions))
            file.write(np.ascontiguousarray(logits).data)
        if not seen:
            return []
        file.flush()
        rows = np.memmap(file, logits.dtype, "r").reshape(-1, logits.shape[1])
    ends = np.cumsum([len(positions) for _, positions in seen])
    return [
        Observation(passage, positions, part)
        for (passage, positions), part in zip(seen, np.split(rows, ends[:-1]), strict=True)
    ]


def _thin(found: Observation) -> Observation:
    """Some of the positions, first and last among them: logits are large."""
    count = len(found.positions)
    if count <= _KEPT:
        return found
    chosen = np.linspace(0, count - 1, _KEPT).round().astype(int)
    return Observation(found.passage, found.positions[chosen], found.logits[chosen])
