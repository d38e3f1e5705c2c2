"""Run a package's graph step by step in plain onnxruntime, for measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.bound_graph import RUNNING, BoundGraph
from llama_onnx.runtime.measure.metrics import Ids, Logits
from llama_onnx.runtime.memory import forgetting_pages
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.targets.graph_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    is_past,
    past_of,
)
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE
from llama_onnx.targets.providers import CPU, provider_of

Cache = Mapping[str, npt.NDArray[Any]]
"""`past_key_values.{i}.key` and `.value`, [B, kv_heads, past, head_dim] each."""

Adapter = Mapping[str, npt.NDArray[Any]]
"""Parameters of a LoRA adapter by graph input; inputs without an entry get rank 0."""


class GraphSession:
    """An open graph: feed ids with a cache, get logits and the next cache."""

    def __init__(
        self,
        session: ort.Session,
        adapter: Adapter | None = None,
        *,
        shares_buffer: bool = True,
        step_seconds: float | None = None,
    ) -> None:
        """Wrap an open `onnxruntime.InferenceSession`; `adapter` is active in every step.

        `shares_buffer`: past and present of its cache can be one buffer. A step that takes longer
        than `step_seconds` ends with `PackageError`.
        """
        self.raw = session
        self.shares_buffer = shares_buffer
        self.adapter = adapter or {}
        self.step_seconds = step_seconds
        self._outputs = [output.name for output in session.get_outputs()]
        self._past = {i.name: i for i in session.get_inputs() if is_past(i.name)}

    @classmethod
    def open(
        cls, package: Path, adapter: Adapter | None = None, *, tiled_attention: bool = True
    ) -> GraphSession:
        """Open the graph of `package` on the CPU, in as little memory as possible.

        Raises `PackageError` if onnxruntime refuses the graph.
        """
        with forgetting_pages(package / DATA_FILE):
            opened = open_session(
                package / MODEL_FILE, CPU, arena=False, tiled_attention=tiled_attention
            )
        return cls(opened.session, adapter, shares_buffer=opened.shares_buffer)

    def empty_cache(self, batch: int = 1, length: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Return a cache of `length` positions, all zero."""
        return {
            name: np.zeros(
                (batch, entry.shape[1], length, entry.shape[3]), ort.numpy_dtype(entry.type)
            )
            for name, entry in self._past.items()
        }

    def step(self, ids: Ids, cache: Cache | None = None) -> tuple[Logits, Cache]:
        """Return the logits for `ids` [S] after `cache`, and the cache that includes them.

        Logits are float32 [S, V], or [1, V] from a graph that computes the last position only.
        """
        past = 0 if cache is None else next(iter(cache.values())).shape[2]
        mask = np.ones((1, past + len(ids)), np.int64)
        logits, cache = self.batch_step(ids[None], mask, cache)
        return logits[0], cache

    def batch_step(self, ids: Ids, mask: Ids, cache: Cache | None = None) -> tuple[Logits, Cache]:
        """Return logits [B, S, V] for `ids` [B, S] and `mask` [B, past + S], and the next cache."""
        if cache is None:
            cache = self.empty_cache(len(ids))
        feeds = {INPUT_IDS: ids, ATTENTION_MASK: mask, **cache, **self.adapter}
        with ort.running(RUNNING), ort.time_limit(self.step_seconds) as options:
            outputs = self.raw.run(self._outputs, feeds, options)
        named = dict(zip(self._outputs, outputs, strict=True))
        return named.pop(LOGITS).astype(np.float32, copy=False), {
            past_of(name): value for name, value in named.items()
        }

    def greedy(self, prompt: Ids, count: int) -> list[int]:
        """Return the `count` tokens that greedily follow `prompt` [P], end tokens ignored."""
        cache, ids = GrowingCache(self), prompt
        tokens: list[int] = []
        while len(tokens) < count:
            tokens.append(int(cache.step(ids)[-1].argmax()))
            ids = np.array(tokens[-1:], np.int64)
        return tokens


class GrowingCache:
    """A cache of one sequence that grows: every step returns a new one."""

    def __init__(self, graph: GraphSession) -> None:
        self._graph = graph
        self._cache: Cache | None = None

    def step(self, ids: Ids) -> Logits:
        """Return logits [S, V] for `ids` [S], which follow those of the steps before."""
        logits, self._cache = self._graph.step(ids, self._cache)
        return logits


class SharedBuffer:
    """A cache of one sequence in one buffer of fixed length, past and present, as genai runs it."""

    def __init__(self, graph: GraphSession, length: int) -> None:
        self._seconds = graph.step_seconds
        self._filled = 0
        provider = provider_of(graph.raw.get_providers()[0])
        device = provider.ort_device if provider else "cpu"
        self._bound = BoundGraph(graph.raw, graph.adapter, device)
        self._bound.bind(graph.empty_cache(length=length))

    def step(self, ids: Ids) -> Logits:
        """Return logits [S, V] for `ids` [S], which follow those of the steps before."""
        self._filled += len(ids)
        mask = np.ones((1, self._filled), np.int64)
        with ort.time_limit(self._seconds) as options:
            logits: Logits = self._bound.run(ids[None], mask, options)[0].copy()
        return logits
