"""The caches of several sequences, and the steps of the graph on them.

All kinds of rows do the same for the loop: a sequence is opened with the most positions it may
need, reads its prompt in parts, makes steps, and is closed. `SharedRows` decodes several sequences
at once; other graphs and devices do one after the other; single_rows.py has those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.bound_graph import BoundGraph, Ids, Parameters
from llama_onnx.runtime.engine.cache_layout import Block, CacheLayout
from llama_onnx.runtime.engine.cache_memory import Buffers, HostBuffers
from llama_onnx.runtime.engine.head_rows import AS_SEVERAL

Logits = npt.NDArray[np.float32]

_SHORTEST = 256
"""Positions of the first buffers."""

_PROMPT = 16
"""Least tokens of a part to read with the graph for prompts, which computes fewer no faster."""


class Rows(Protocol):
    """Caches of sequences, which are known by a number."""

    @property
    def allocated(self) -> int:
        """The positions, over all rows, that buffers exist for."""

    @property
    def broken(self) -> bool:
        """Whether a failure left the caches of all sequences in doubt."""

    def open(self, key: int, most: int) -> None:
        """Start a sequence of at most `most` positions."""

    def close(self, key: int) -> None:
        """End a sequence."""

    def filled(self, key: int) -> int:
        """Return how many positions of a sequence are in its cache."""

    def read(self, key: int, ids: Ids, options: Any = None, *, more: bool = False) -> Logits:
        """Append `ids` to a sequence and return the logits [V] after the last of them, which the
        next run may overwrite. `more`: more of a prompt follows, and nobody reads these logits."""

    def step(self, tokens: Mapping[int, int], options: Any = None) -> Mapping[int, Logits]:
        """Append a token to each sequence, and return the logits [V] after it, which the next step
        may overwrite."""

    def copy(self, key: int, start: int, end: int) -> Block | None:
        """Return a copy of the positions from `start` to `end`; None where the device cannot."""

    def append(self, key: int, block: Block) -> None:
        """Append what another sequence read to the cache of this one."""

    def compact(self) -> None:
        """Give back the memory of sequences that were closed."""


class SharedRows:
    """Rows of buffers that the attention writes in place, for graphs with GroupQueryAttention.

    The leading dimension of a buffer is the row, so a range of rows is a contiguous view that a
    step can be bound to. Buffers grow, to twice as many positions and for one more row at a time,
    and never beyond what the open sequences may need.
    """

    def __init__(
        self,
        session: ort.Session,
        layout: CacheLayout,
        adapter: Parameters,
        buffers: Buffers | None = None,
        device: str = "cpu",
        prompts: ort.Session | None = None,
    ) -> None:
        """Open no row yet. `buffers` are those of `device`; None: of the process. `prompts` is a
        session for parts of prompts of some length."""
        self._buffers = buffers or HostBuffers(layout)
        self._steps, self._reads = (BoundGraph(session, adapter, device) for _ in range(2))
        self._prompts = BoundGraph(prompts, adapter, device) if prompts else self._reads
        self._bound: dict[BoundGraph, tuple[int, int]] = {}  # graph -> the rows bound to it
        self._order: list[int | None] = []  # row -> sequence
        self._filled: dict[int, int] = {}
        self._most: dict[int, int] = {}
        self._length = 0
        # A step makes no arrays: the first call of a function after a run, which has emptied the
        # processor's caches, takes many times as long as a later one.
        self._tokens, self._ones = np.empty((0, 1), np.int64), np.empty(0, np.int64)
        self.broken = False

    @property
    def allocated(self) -> int:
        """Rows times positions of the buffers."""
        return len(self._order) * self._length

    def open(self, key: int, most: int) -> None:
        """Start a sequence in the first free row; buffers come with its first positions."""
        self._filled[key], self._most[key] = 0, most
        if None in self._order:
            self._order[self._order.index(None)] = key
        else:  # a long sequence that is over may have left buffers longer than any needs now
            self._allocate([*self._order, key], min(self._length, max(self._most.values())))

    def close(self, key: int) -> None:
        """End a sequence; its row is free for another."""
        self._order[self._order.index(key)] = None
        del self._filled[key], self._most[key]

    def filled(self, key: int) -> int:
        """Return how many positions of a sequence are in its cache."""
        return self._filled[key]

    def read(self, key: int, ids: Ids, options: Any = None, *, more: bool = False) -> Logits:
        """Append `ids` to a sequence and return the logits [V] after the last of them.

        The graph for prompts reads all but a prompt's last tokens: whoever asks the same again gets
        the others from what was kept, and then reads these few. So the answer is the same.
        """
        if self._prompts is not self._reads and len(ids) >= _PROMPT:
            end = len(ids) if more else len(ids) - AS_SEVERAL
            logits = self._append(self._prompts, key, ids[:end], options, AS_SEVERAL)
            if not more:
                logits = self._append(self._reads, key, ids[end:], options, AS_SEVERAL)
        else:
            logits = self._append(self._reads, key, ids, options, AS_SEVERAL)
        last: Logits = logits[-1]
        return last

    def verify(self, key: int, ids: Ids, options: Any = None) -> Logits:
        """Append `ids` to a sequence and return the logits [S, V] after each of them; [1, V] if the
        graph computes the last only. The next run may overwrite them."""
        return self._append(self._reads, key, ids, options, None)

    def _append(
        self, graph: BoundGraph, key: int, ids: Ids, options: Any, last: int | None
    ) -> Logits:
        end = self._filled[key] + len(ids)
        self._reserve(end)
        row = self._order.index(key)
        self._bind(graph, row, row + 1)
        logits = graph.run(ids[None], np.ones((1, end), np.int64), options, last)
        self._filled[key] = end
        after: Logits = logits[0]
        return after

    def rewind(self, key: int, filled: int) -> None:
        """Forget the positions of a sequence from `filled` on: the next are written over them.

        Attention reads no further than the mask counts, so that they need not be cleared.
        """
        assert filled <= self._filled[key]
        self._filled[key] = filled

    def step(self, tokens: Mapping[int, int], options: Any = None) -> Mapping[int, Logits]:
        """Append a token to each sequence, all in one step, and return the logits [V] after it."""
        self._reserve(max(self._filled[key] for key in tokens) + 1)
        self._gather(list(tokens))
        keys = [key for key in self._order[: len(tokens)] if key is not None]
        self._bind(self._steps, 0, len(keys))
        mask = self._mask([self._filled[key] + 1 for key in keys])
        if len(self._tokens) != len(keys):
            self._tokens = np.empty((len(keys), 1), np.int64)
        self._tokens[:, 0] = [tokens[key] for key in keys]
        logits = self._steps.run(self._tokens, mask, options)
        for key in keys:
            self._filled[key] += 1
        return {key: logits[row, -1] for row, key in enumerate(keys)}

    def _mask(self, lengths: Sequence[int]) -> Ids:
        """Return the mask of rows of these lengths, with ones at the end: there the graph looks for
        the new tokens. Attention only counts them."""
        rows, longest = len(lengths), max(lengths)
        if self._ones.size < rows * longest:
            self._ones = np.ones(2 * rows * longest, np.int64)
        if min(lengths) == longest:
            return self._ones[: rows * longest].reshape(rows, longest)
        starts = longest - np.array(lengths)
        return (np.arange(longest) >= starts[:, None]).astype(np.int64)

    def copy(self, key: int, start: int, end: int) -> Block:
        """Return a copy of the positions from `start` to `end`."""
        row = self._order.index(key)
        return self._buffers.take(row, start, end)

    def append(self, key: int, block: Block) -> None:
        """Append what another sequence read to the cache of this one."""
        start = self._filled[key]
        end = start + next(iter(block.values())).shape[1]
        self._reserve(end)
        row = self._order.index(key)
        self._buffers.put(row, start, block)
        self._filled[key] = end

    def compact(self) -> None:
        """Move the open sequences to buffers that are no larger than they may need."""
        length = min(self._length, max(self._most.values(), default=0))
        self._allocate([key for key in self._order if key is not None], length)

    def _reserve(self, positions: int) -> None:
        """Make the buffers long enough for `positions` of a row."""
        if positions > self._length:
            longest = max(self._most.values())
            length = min(max(positions, 2 * self._length, _SHORTEST), max(longest, positions))
            self._allocate([key for key in self._order if key is not None], length)

    def _allocate(self, order: Sequence[int | None], length: int) -> None:
        """Move the sequences to new buffers, in which row i belongs to `order[i]`."""
        moves = [
            (row, self._order.index(key), self._filled[key])
            for row, key in enumerate(order)
            if key is not None and key in self._order
        ]
        self._release()
        self.broken = True  # unless all layers are moved
        self._buffers.resize(len(order) if length else 0, length, moves)
        self._order, self._length, self.broken = list(order), length, False

    def _gather(self, keys: Sequence[int]) -> None:
        """Move the sequences `keys` to the first rows."""
        outside = [row for row, key in enumerate(self._order) if key in keys and row >= len(keys)]
        for row in range(len(keys)):
            if self._order[row] not in keys:
                self._swap(row, outside.pop())

    def _swap(self, row: int, other: int) -> None:
        """Exchange the contents of two rows, the first of which may be free."""
        first, second = self._order[row], self._order[other]
        filled = max(self._filled[key] for key in (first, second) if key is not None)
        self.broken = True  # unless both are moved whole
        self._buffers.swap(row, other, filled)
        self._order[row], self._order[other], self.broken = second, first, False

    def _bind(self, graph: BoundGraph, first: int, end: int) -> None:
        if self._bound.get(graph) != (first, end):
            graph.bind(self._buffers.views(first, end))
            self._bound[graph] = (first, end)

    def _release(self) -> None:
        self._bound.clear()
        for graph in (self._steps, self._reads, self._prompts):
            graph.release()
