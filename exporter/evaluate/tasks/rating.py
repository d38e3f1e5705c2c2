"""Log-probabilities of given continuations: by a package's graph, and by its original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.reference.walk import walk_layers
from llama_onnx.runtime.measure.graph_session import Cache, GraphSession
from llama_onnx.runtime.measure.metrics import Ids, Logits, nats_of_next
from llama_onnx.targets.errors import PackageError

_CHUNK = 256
"""Tokens that the graph reads at a time: their logits are in memory together."""

_LOGIT_BYTES = 256 << 20
_TOKENS = 1 << 15
"""Of what passes through the layers of the original together."""


@dataclass(frozen=True)
class Pair:
    """The tokens of a context, at least one, and those of its continuation, at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Rating:
    """The log-probability of a continuation, in nats; whether it is the model's greedy choice."""

    logprob: float
    greedy: bool


def rate_by_graph(graph: GraphSession, pairs: Sequence[Pair]) -> Iterator[tuple[int, Rating]]:
    """Yield the number of each pair and its rating; a context that several share is read once."""
    order = sorted(range(len(pairs)), key=lambda number: pairs[number].context)
    for context, group in groupby(order, key=lambda number: pairs[number].context):
        *_, (logits, cache) = _read(graph, np.array(context), None)
        last = logits[-1:]
        for number in group:
            ids = np.array(pairs[number].continuation)
            nats, greedy = _compare(last, ids[:1])
            done = 1
            for logits, _ in _read(graph, ids[:-1], cache, every=True):
                more, same = _compare(logits, ids[done : done + len(logits)])
                nats, greedy, done = nats + more, greedy and same, done + len(logits)
            yield number, Rating(-nats, greedy)


def _read(
    graph: GraphSession, ids: Ids, cache: Cache | None, *, every: bool = False
) -> Iterator[tuple[Logits, Cache]]:
    """Yield logits and the cache after each part of `ids`; with `every`, logits of all positions,
    also from a graph that computes the last one only."""
    start, size = 0, _CHUNK
    while start < len(ids):
        part = ids[start : start + size]
        logits, after = graph.step(part, cache)
        if every and len(logits) < len(part):
            size = 1
            continue
        cache, start = after, start + len(part)
        yield logits, cache


def rate_by_layers(checkpoint: Checkpoint, pairs: Sequence[Pair]) -> Iterator[tuple[int, Rating]]:
    """Yield the same by PyTorch, one layer in memory; sequences that pairs share are read once."""
    groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, pair in enumerate(pairs):
        read = (*pair.context, *pair.continuation[:-1])
        groups.setdefault((read, len(pair.continuation)), []).append(number)
    for some in _portions(list(groups), checkpoint.config.vocab_size):
        sequences = [np.array(read) for read, _ in some]
        positions = [np.arange(len(read) - count, len(read)) for read, count in some]
        *_, (_, rows) = walk_layers(checkpoint, sequences, positions)
        for key, logits in zip(some, rows, strict=True):
            for number in groups[key]:
                nats, greedy = _compare(logits, np.array(pairs[number].continuation))
                yield number, Rating(-nats, greedy)


def _portions(
    keys: Sequence[tuple[tuple[int, ...], int]], vocabulary: int
) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    part: list[tuple[tuple[int, ...], int]] = []
    tokens = size = 0
    for read, count in keys:
        more = 4 * vocabulary * count
        if part and (size + more > _LOGIT_BYTES or tokens + len(read) > _TOKENS):
            yield part
            part, tokens, size = [], 0, 0
        part.append((read, count))
        tokens, size = tokens + len(read), size + more
    if part:
        yield part


def _compare(logits: Logits, ids: Ids) -> tuple[float, bool]:
    """Return the nats of `ids` [S] after logits [S, V], and whether each has the largest logit."""
    nats = float(nats_of_next(logits, ids).sum())
    if not np.isfinite(nats):
        raise PackageError(
            "the package or its original computes logits that are not numbers: "
            "`llama-onnx validate` finds where."
        )
    return nats, bool((logits.argmax(-1) == ids).all())
