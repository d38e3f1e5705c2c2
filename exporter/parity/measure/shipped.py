"""The package as it ships, run by plain onnxruntime in every situation.

This is the only time that a whole session is in memory, and PyTorch is not loaded yet.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile

import numpy as np

from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.graph_session import GraphSession, GrowingCache
from llama_onnx.runtime.measure.metrics import Ids
from llama_onnx.runtime.measure.situations import (
    DECODE,
    Observation,
    Passage,
    Situation,
    decode,
    looks_everywhere,
    prefill,
    run_plainly,
    try_situation,
)
from llama_onnx.runtime.measure.speed import Speed, measure_speed
from llama_onnx.runtime.memory import trim_heap
from llama_onnx.targets.progress import Progress

_TRIM = 16  # steps between two calls of trim_heap
_MAX_POSITIONS = 24  # kept of one observation, if not all of them are


@dataclass(frozen=True)
class PromptSet:
    """Prompts (ids [P] each), every one to be continued greedily by `tokens`, 2 or more: the first
    token comes from the prefill, the others are decoded."""

    prompts: Sequence[Ids]
    tokens: int


NO_PROMPTS = PromptSet((), 0)


@dataclass(frozen=True)
class Shipped:
    """What the package as it ships did: the prompts with the tokens that follow them greedily, the
    logits observed in each situation, and the speed on the longest passage.

    `certificate_passages` are the passages of the certificate, which are only continued;
    `evaluation_passages` those that fidelity is measured on, which are only read, and `evaluation`
    has the logits at each of their positions.
    """

    passages: tuple[Passage, ...]
    certificate_passages: tuple[Passage, ...]
    evaluation_passages: tuple[Passage, ...]
    observations: dict[str, list[Observation]]
    evaluation: list[Observation]
    speed: Speed


def run_shipped(
    subject: Subject,
    prompts: PromptSet,
    certificate_prompts: PromptSet,
    evaluation: Sequence[Ids],
    situations: Sequence[Situation],
    progress: Progress,
) -> Shipped:
    """Continue both sets of prompts, then try every situation on the passages of the first, and
    read the sequences of the `evaluation`."""
    graph = GraphSession.open(subject.path, subject.adapter)
    total = 3 + len(situations)
    passages, continued = _continue(graph, prompts)
    progress.update("onnxruntime", 1, total)
    certificate_passages, _ = _continue(graph, certificate_prompts)
    progress.update("onnxruntime", 2, total)
    observations = {}
    for index, situation in enumerate(situations):
        if situation == DECODE:  # which is how the passages were made
            observations[situation.name] = continued
        else:
            found = try_situation(situation, graph, passages)
            kept = found if looks_everywhere(situation) else map(_thin_out, found)
            observations[situation.name] = _on_disk(kept)
            trim_heap()
        progress.update("onnxruntime", 3 + index, total)
    read = tuple(Passage(ids, len(ids)) for ids in evaluation)
    evaluated = _read(graph, read)
    progress.update("onnxruntime", total, total)
    longest = max(passages, key=lambda passage: passage.prompt)
    speed = measure_speed(graph, longest.ids, longest.prompt)
    return Shipped(passages, certificate_passages, read, observations, evaluated, speed)


def _continue(
    graph: GraphSession, prompts: PromptSet
) -> tuple[tuple[Passage, ...], list[Observation]]:
    """Continue each prompt greedily. Return the passages, and what was observed in their steps,
    which are those of the situation `DECODE`: the prompt at once, then one token at a time."""
    passages: list[Passage] = []

    def observed() -> Iterator[Observation]:
        for index, prompt in enumerate(prompts.prompts):
            ids = yield from _greedy_steps(graph, index, prompt, prompts.tokens)
            passages.append(Passage(ids, len(prompt)))
            trim_heap()

    found = _on_disk(observed())
    return tuple(passages), found


def _greedy_steps(
    graph: GraphSession, index: int, prompt: Ids, tokens: int
) -> Generator[Observation, None, Ids]:
    """Yield what the steps of passage number `index` give: of the prompt, and of each of the
    `tokens` that follow it greedily. Return the ids of all."""
    cache, ids, fed = GrowingCache(graph), prompt, prompt
    while True:
        logits = cache.step(fed)
        last = len(ids)
        yield Observation(index, np.arange(last - len(logits), last), logits)
        if last == len(prompt) + tokens:
            return ids
        if last % _TRIM == 0:  # growing caches leave holes in the heap
            trim_heap()
        fed = logits[-1:].argmax(axis=-1)
        ids = np.concatenate([ids, fed])


def _read(graph: GraphSession, passages: Sequence[Passage]) -> list[Observation]:
    """Return the logits at every position of every passage."""
    found = _on_disk(run_plainly(graph, prefill(passages)))
    if sum(len(o.positions) for o in found) < sum(len(p.ids) for p in passages):
        # A graph that computes the last position only: token by token, all are last.
        found = _on_disk(run_plainly(graph, decode([Passage(p.ids, 1) for p in passages])))
    trim_heap()
    return found


def _on_disk(found: Iterable[Observation]) -> list[Observation]:
    """Move the logits to one unnamed file, which is deleted when nothing refers to it any more."""
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


def _thin_out(found: Observation) -> Observation:
    """Keep some of the positions, including the first and last: logits are large."""
    count = len(found.positions)
    if count <= _MAX_POSITIONS:
        return found
    chosen = np.linspace(0, count - 1, _MAX_POSITIONS).round().astype(int)
    return Observation(found.passage, found.positions[chosen], found.logits[chosen])
