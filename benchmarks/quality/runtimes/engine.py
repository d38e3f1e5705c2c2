"""ONNX packages in our own engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality.figures import Array
from llama_onnx.runtime.bench.together import run_streams
from llama_onnx.runtime.llama.model import Llama


class Model:
    """A package as `llama-onnx generate` runs it."""

    def __init__(self, path: Path, threads: int) -> None:
        self._model = Llama.load(path, threads=threads)

    def logits(self, ids: Sequence[int]) -> Array:
        """Raise: the runtime `onnx` measures quality."""
        raise NotImplementedError

    def answer(self, ids: Sequence[int], most: int, end: int) -> list[int]:
        """Continue greedily."""
        answer = self._model.generate(ids, max_new_tokens=most)
        return [event.token for event in answer.events() if hasattr(event, "token")]

    def seconds(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Time one answer, of a prompt nothing is known of and without drafts."""
        start = time.perf_counter()
        stats = self._model.measure(ids, new + 1)
        whole = time.perf_counter() - start
        return stats.first_token_seconds, whole - stats.first_token_seconds

    def streams(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Return the tokens a second of all answers together, while all are generated."""
        arrays = [np.array(ids, np.int32) for ids in prompts]
        return run_streams(self._model.backend.require_engine(), arrays, new).rate
