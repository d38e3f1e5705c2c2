"""ONNX packages: logits by onnxruntime, answers and speed by onnxruntime-genai."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort

from benchmarks.quality.figures import Array


class Model:
    """A package as it ships: accuracy level, optimizations and all."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads = path, threads

    @cached_property
    def _session(self) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        return ort.InferenceSession(
            str(self._path / self._decoder["filename"]), options, providers=["CPUExecutionProvider"]
        )

    @cached_property
    def _decoder(self) -> Any:
        config = json.loads((self._path / "genai_config.json").read_text("utf-8"))
        return config["model"]["decoder"]

    def logits(self, ids: Sequence[int]) -> Array:
        """Run the text as one prompt, with empty caches."""
        feeds: dict[str, Array] = {}
        for entry in self._session.get_inputs():
            if entry.name == "input_ids":
                value = np.array([ids], np.int64)
            elif entry.name == "attention_mask":
                value = np.ones((1, len(ids)), np.int64)
            elif entry.name == "position_ids":
                value = np.arange(len(ids), dtype=np.int64)[None]
            elif entry.name.startswith("past_key_values."):
                heads, width = self._decoder["num_key_value_heads"], self._decoder["head_size"]
                kinds = {"float": np.float32, "float16": np.float16, "int8": np.int8}
                value = np.zeros((1, heads, 0, width), kinds[entry.type[7:-1]])
            else:
                raise ValueError(f"{self._path}: unknown input {entry.name}.")
            feeds[entry.name] = value
        found: Array = self._session.run(["logits"], feeds)[0][0]
        return found.astype(np.float32)

    @cached_property
    def _genai(self) -> Any:
        import onnxruntime_genai as og

        config = og.Config(str(self._path))
        settings = {"intra_op_num_threads": self._threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
        return og.Model(config)

    def _generator(self, length: int, least: int) -> Any:
        import onnxruntime_genai as og

        params = og.GeneratorParams(self._genai)
        params.set_search_options(max_length=length, min_length=least, do_sample=False)
        return og.Generator(self._genai, params)

    def answer(self, ids: Sequence[int], most: int, end: int) -> list[int]:
        """Let genai generate; it knows the model's end tokens itself."""
        generator = self._generator(len(ids) + most, 0)
        generator.append_tokens(list(ids))
        while not generator.is_done():
            generator.generate_next_token()
        found = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
        return found[: found.index(end)] if end in found else found

    def seconds(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Time genai."""
        length = len(ids) + new + 1
        generator = self._generator(length, length)
        start = time.perf_counter()
        generator.append_tokens(list(ids))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first
