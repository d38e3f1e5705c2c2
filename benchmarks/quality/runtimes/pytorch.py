"""The source in transformers, in float32: what a user has without any of this."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.figures import Array
from benchmarks.quality.worker import greedy


class Model:
    """A Hugging Face folder."""

    def __init__(self, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._model = model.eval()  # type: ignore[no-untyped-call]
        self._past = None

    def _step(self, ids: Sequence[int]) -> Array:
        with torch.inference_mode():
            found = self._model(
                torch.tensor([list(ids)]),
                past_key_values=self._past,
                use_cache=True,
                logits_to_keep=1,
            )
        self._past = found.past_key_values
        last: Array = found.logits[0, -1].numpy()
        return last

    def logits(self, ids: Sequence[int]) -> Array:
        """Run the text as one prompt."""
        with torch.inference_mode():
            found: Array = self._model(torch.tensor([list(ids)])).logits[0].numpy()
        return found

    def answer(self, ids: Sequence[int], most: int, end: int) -> list[int]:
        """Continue greedily."""
        self._past = None
        return greedy(self._step, ids, most, end)

    def seconds(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Time the plain loop; the head computes the last position only."""
        self._past = None
        start = time.perf_counter()
        token = int(self._step(ids).argmax())
        first = time.perf_counter()
        for _ in range(new):
            token = int(self._step([token]).argmax())
        return first - start, time.perf_counter() - first
