"""llama.cpp, one GGUF file, with its defaults for the cache and for attention."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality.figures import Array
from benchmarks.quality.llama_library import Batch, open_library
from benchmarks.quality.worker import greedy

CONTEXT, SEQUENCES = 4096, 8


class Model:
    """The library is in the folder that LLAMA_CPP_LIBRARY names."""

    def __init__(self, path: Path, threads: int) -> None:
        lib = self._lib = open_library(Path(os.environ["LLAMA_CPP_LIBRARY"]))
        model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_seq_max = CONTEXT, 2048, SEQUENCES
        settings.kv_unified = True  # the cells go to whichever sequence needs them
        settings.n_threads = settings.n_threads_batch = threads
        self._context = lib.llama_init_from_model(model, settings)
        if not model or not self._context:
            raise SystemExit(f"llama.cpp could not open {path}.")
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def _restart(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, batch: Batch) -> None:
        if self._lib.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not decode a batch.")

    def logits(self, ids: Sequence[int]) -> Array:
        """Run the text as one batch and ask for the logits of every position."""
        self._restart()
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = 1
        self._decode(batch)
        found = self._lib.llama_get_logits(self._context)
        copied = np.ctypeslib.as_array(found, (len(ids), self._vocabulary)).copy()
        self._lib.llama_batch_free(batch)
        return copied

    def _step(self, ids: Sequence[int]) -> Array:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        self._decode(self._lib.llama_batch_get_one(tokens, len(ids)))
        found = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (self._vocabulary,))

    def streams(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Read all prompts, and time steps of one token for each sequence, as its server makes."""
        self._restart()
        for number, ids in enumerate(prompts):
            self._run([(token, place, number) for place, token in enumerate(ids)])
        tokens = [1] * len(prompts)
        start = time.perf_counter()
        for place in range(new):
            rows = [
                (token, len(prompts[number]) + place, number) for number, token in enumerate(tokens)
            ]
            tokens = [int(logits.argmax()) for logits in self._run(rows, every=True)]
        return len(prompts) * new / (time.perf_counter() - start)

    def _run(self, rows: Sequence[tuple[int, int, int]], every: bool = False) -> list[Array]:
        """Run (token, position, sequence); return the logits of each, or of the last."""
        batch = self._lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for index, (token, place, sequence) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = every or index == len(rows) - 1
        self._decode(batch)
        wanted = range(len(rows)) if every else [len(rows) - 1]
        found = [self._lib.llama_get_logits_ith(self._context, index) for index in wanted]
        copied = [np.ctypeslib.as_array(each, (self._vocabulary,)).copy() for each in found]
        self._lib.llama_batch_free(batch)
        return copied

    def answer(self, ids: Sequence[int], most: int, end: int) -> list[int]:
        """Continue greedily."""
        self._restart()
        return greedy(self._step, ids, most, end)

    def seconds(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Time the C API, which computes the logits of the last position only."""
        self._restart()
        start = time.perf_counter()
        token = int(self._step(ids).argmax())
        first = time.perf_counter()
        for _ in range(new):
            token = int(self._step([token]).argmax())
        return first - start, time.perf_counter() - first
