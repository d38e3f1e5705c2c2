"""OpenVINO's stateful models, with the defaults of its CPU plugin."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from benchmarks.quality.figures import Array
from benchmarks.quality.worker import greedy


class Model:
    """A folder with openvino_model.xml."""

    def __init__(self, path: Path, threads: int) -> None:
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", settings)
        self._names = {name for entry in compiled.inputs for name in entry.names}
        self._request = compiled.create_infer_request()
        self._seen = 0

    def _step(self, ids: Sequence[int]) -> Array:
        count, self._seen = len(ids), self._seen + len(ids)
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, self._seen), np.int64),
            "position_ids": np.arange(self._seen - count, self._seen, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: feeds[name] for name in self._names})
        return np.array(self._request.get_tensor("logits").data[0], np.float32)

    def _restart(self) -> None:
        self._request.reset_state()
        self._seen = 0

    def logits(self, ids: Sequence[int]) -> Array:
        """Run the text as one prompt."""
        self._restart()
        return self._step(ids)

    def answer(self, ids: Sequence[int], most: int, end: int) -> list[int]:
        """Continue greedily."""
        self._restart()
        return greedy(lambda new: self._step(new)[-1], ids, most, end)

    def streams(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Time steps of a batch whose prompts are equally long."""
        self._restart()
        tokens = self._batch(prompts)
        start = time.perf_counter()
        for _ in range(new):
            tokens = self._batch([[token] for token in tokens])
        return len(prompts) * new / (time.perf_counter() - start)

    def _batch(self, rows: Sequence[Sequence[int]]) -> list[int]:
        count, self._seen = len(rows[0]), self._seen + len(rows[0])
        places = np.arange(self._seen - count, self._seen, dtype=np.int64)
        feeds: dict[str, Any] = {
            "input_ids": np.array(rows, np.int64),
            "attention_mask": np.ones((len(rows), self._seen), np.int64),
            "position_ids": np.tile(places, (len(rows), 1)),
            "beam_idx": np.arange(len(rows), dtype=np.int32),
        }
        self._request.infer({name: feeds[name] for name in self._names})
        logits = self._request.get_tensor("logits").data[:, -1]
        return [int(token) for token in logits.argmax(axis=-1)]

    def seconds(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Time the plain loop; the logits of every position are computed, as the model is."""
        self._restart()
        start = time.perf_counter()
        token = int(self._step(ids)[-1].argmax())
        first = time.perf_counter()
        for _ in range(new):
            token = int(self._step([token])[-1].argmax())
        return first - start, time.perf_counter() - first
