"""Caches of sequences that the graph decodes one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.bound_graph import RUNNING, BoundGraph, Ids, Parameters
from llama_onnx.runtime.engine.cache_layout import Block, Buffers, CacheLayout
from llama_onnx.runtime.engine.head_rows import AS_SEVERAL, LOGITS_FROM, chooses_rows
from llama_onnx.runtime.engine.shared_rows import Logits, Rows
from llama_onnx.runtime.memory import trim_heap
from llama_onnx.targets.graph_names import ATTENTION_MASK, INPUT_IDS, LOGITS, past_of

_TRIM = 16  # steps between two calls of trim_heap


class GrowingRows(Rows):
    """A cache for each sequence, a new and longer one after each step.

    For graphs whose past and present cannot be one buffer.
    """

    def __init__(self, session: ort.Session, layout: CacheLayout, adapter: Parameters) -> None:
        self._session, self._layout, self._adapter = session, layout, adapter
        self._outputs = [output.name for output in session.get_outputs()]
        self._chooses_rows = chooses_rows(session)
        self._caches: dict[int, Buffers] = {}
        self._runs = 0

    @property
    def allocated(self) -> int:
        """The positions of all caches."""
        return sum(self.filled(key) for key in self._caches)

    @property
    def broken(self) -> bool:
        """False: a step that fails changes no cache."""
        return False

    def open(self, key: int, most: int) -> None:
        """Start a sequence, with an empty cache."""
        self._caches[key] = self._layout.buffers(1, 0)

    def close(self, key: int) -> None:
        """End a sequence and free its cache."""
        self._caches.pop(key, None)

    def filled(self, key: int) -> int:
        """Return how many positions of a sequence are in its cache."""
        return int(next(iter(self._caches[key].values())).shape[2])

    def read(self, key: int, ids: Ids, options: Any = None, *, more: bool = False) -> Logits:
        """Append `ids` to a sequence and return the logits [V] after the last of them."""
        mask = np.ones((1, self.filled(key) + len(ids)), np.int64)
        feeds = {INPUT_IDS: ids[None], ATTENTION_MASK: mask, **self._caches[key], **self._adapter}
        if self._chooses_rows:
            feeds[LOGITS_FROM] = np.array([max(0, len(ids) - AS_SEVERAL)])
        with ort.running(RUNNING):
            outputs = self._session.run(self._outputs, feeds, options)
        named = dict(zip(self._outputs, outputs, strict=True))
        logits: Logits = named.pop(LOGITS)[0, -1].astype(np.float32)
        self._caches[key] = {past_of(name): value for name, value in named.items()}
        self._runs += 1
        if self._runs % _TRIM == 0:
            trim_heap()
        return logits

    def step(self, tokens: Mapping[int, int], options: Any = None) -> Mapping[int, Logits]:
        """Append a token to each sequence, and return the logits [V] after it."""
        return {
            key: self.read(key, np.array([token], np.int64), options)
            for key, token in tokens.items()
        }

    def copy(self, key: int, start: int, end: int) -> Block:
        """Return a copy of the positions from `start` to `end`."""
        return {name: cache[0, :, start:end].copy() for name, cache in self._caches[key].items()}

    def append(self, key: int, block: Block) -> None:
        """Append what another sequence read to the cache of this one."""
        self._caches[key] = {
            name: np.concatenate([cache, block[name][None]], axis=2)
            for name, cache in self._caches[key].items()
        }

    def compact(self) -> None:
        """Do nothing: no cache is longer than its sequence."""


class DeviceRows(Rows):
    """A buffer for each sequence on a device, as long as the sequence may become.

    Caches on a device are neither copied nor moved, so no sequence starts with what another read.
    """

    def __init__(
        self, session: ort.Session, layout: CacheLayout, adapter: Parameters, device: str
    ) -> None:
        self._session, self._layout, self._adapter = session, layout, adapter
        self._device = device
        self._bound: dict[int, BoundGraph] = {}
        self._filled: dict[int, int] = {}
        self._most: dict[int, int] = {}

    @property
    def allocated(self) -> int:
        """The positions of all buffers."""
        return sum(self._most.values())

    @property
    def broken(self) -> bool:
        """False: a step that fails concerns one buffer."""
        return False

    def open(self, key: int, most: int) -> None:
        """Start a sequence, with a buffer of `most` positions."""
        bound = BoundGraph(self._session, self._adapter, self._device)
        bound.bind(self._layout.buffers(1, most))
        self._bound[key], self._filled[key], self._most[key] = bound, 0, most

    def close(self, key: int) -> None:
        """End a sequence and free its buffer."""
        for of_sequence in (self._bound, self._filled, self._most):
            of_sequence.pop(key, None)

    def filled(self, key: int) -> int:
        """Return how many positions of a sequence are in its buffer."""
        return self._filled[key]

    def read(self, key: int, ids: Ids, options: Any = None, *, more: bool = False) -> Logits:
        """Append `ids` to a sequence and return the logits [V] after the last of them."""
        end = self._filled[key] + len(ids)
        logits = self._bound[key].run(ids[None], np.ones((1, end), np.int64), options)
        self._filled[key] = end
        last: Logits = logits[0, -1]
        return last

    def step(self, tokens: Mapping[int, int], options: Any = None) -> Mapping[int, Logits]:
        """Append a token to each sequence, and return the logits [V] after it."""
        return {
            key: self.read(key, np.array([token], np.int64), options)
            for key, token in tokens.items()
        }

    def copy(self, key: int, start: int, end: int) -> None:
        """Return None: the cache is on the device."""

    def append(self, key: int, block: Block) -> None:
        """Do nothing: there are no copies."""

    def compact(self) -> None:
        """Do nothing: a closed sequence's buffer is gone."""
