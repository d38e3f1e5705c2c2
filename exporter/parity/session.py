"""A package's graph run by plain onnxruntime on the CPU, as the measuring instrument needs it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
import onnxruntime as ort

from llama_onnx.exporter.checkpoints.base import Float32
from llama_onnx.exporter.checkpoints.package import load_model
from llama_onnx.exporter.walk import Ids
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import MODEL_FILE

PROVIDER = "CPUExecutionProvider"

FP32_ACTIVATIONS = 1
"""MatMulNBits' accuracy_level that keeps activations in float32; 4 rounds them to int8 blocks."""

Cache = dict[str, Any]
"""`past_key_values.{i}.key` and `.value`, float32 [1, kv_heads, past, head_dim] each."""


@dataclass(frozen=True)
class Trace:
    """What a graph makes of one prompt [P] and the n tokens it adds greedily.

    `ids` [P + n - 1] is all that was fed. `prefill` are float32 logits [P + n - 1, V] of one pass
    over them ([1, V], the last position, if the head is pruned), `decode` [n - 1, V] those of the
    steps that fed the continuation token by token, from position P on. `tokens` [n] were chosen at
    positions P - 1 on; an end token does not end it.
    """

    prompt_length: int
    ids: Ids
    tokens: list[int]
    prefill: Float32
    decode: Float32


class PackageSession:
    """An open package: feed ids with a cache, get logits and the next cache."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Wrap an open session; `open` makes one from a folder."""
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        shapes = {i.name: i.shape for i in session.get_inputs() if "past_key" in i.name}
        self._empty: Cache = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()
        }

    @classmethod
    def open(cls, package: Path, accuracy_level: int | None = None) -> PackageSession:
        """Open `package` as it ships, or with every MatMulNBits' accuracy_level set anew.

        Raises `PackageError` with onnxruntime's own words when it refuses the graph.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        model: str | bytes = str(package / MODEL_FILE)
        if accuracy_level is not None:
            model = _with_accuracy_level(load_model(package), accuracy_level).SerializeToString()
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(package))
        try:
            return cls(ort.InferenceSession(model, options, providers=[PROVIDER]))
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise PackageError(f"onnxruntime refuses {package / MODEL_FILE}: {error}") from error

    def step(self, ids: Ids, cache: Cache | None = None) -> tuple[Float32, Cache]:
        """Logits [S, V] (or [1, V]) behind `ids` [S] and the cache that includes them."""
        cache = self._empty if cache is None else cache
        past = next(iter(cache.values())).shape[2]
        mask = np.ones((1, past + len(ids)), np.int64)
        outputs = self._session.run(
            self._outputs, {"input_ids": ids[None], "attention_mask": mask, **cache}
        )
        named = dict(zip(self._outputs, outputs, strict=True))
        return named.pop("logits")[0], {
            name.replace("present.", "past_key_values."): value for name, value in named.items()
        }

    def prefill(self, ids: Ids) -> Float32:
        """Logits of one pass over `ids` [S]: [S, V], or [1, V] when the head is pruned."""
        return self.step(ids)[0]

    def greedy(self, pieces: Sequence[Ids], count: int) -> tuple[list[int], Float32]:
        """Continue a prompt, fed in `pieces` one after the other, by `count` tokens.

        Returns them and the logits [count, V] each was taken from.
        """
        cache = None
        for piece in pieces:
            logits, cache = self.step(piece, cache)
        rows, tokens = [logits[-1]], [int(logits[-1].argmax())]
        while len(tokens) < count:
            logits, cache = self.step(np.array(tokens[-1:]), cache)
            rows.append(logits[-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens, np.stack(rows)

    def trace(self, pieces: Sequence[Ids], count: int) -> Trace:
        """Everything parity needs to know about one prompt and `count` (2 or more) further tokens.

        In `pieces` because a cache must be right however it was filled.
        """
        tokens, rows = self.greedy(pieces, count)
        ids = np.concatenate([*pieces, np.array(tokens[:-1], np.int64)])
        length = sum(len(piece) for piece in pieces)
        return Trace(length, ids, tokens, self.prefill(ids), rows[1:])


def quantizes_activations(package: Path) -> bool:
    """Whether the package, as shipped, computes with activations coarser than float32."""
    return any(level > FP32_ACTIVATIONS for level in _accuracy_levels(load_model(package)))


def _accuracy_levels(model: onnx.ModelProto) -> Sequence[int]:
    return [
        attribute.i
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]


def _with_accuracy_level(model: onnx.ModelProto, level: int) -> onnx.ModelProto:
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    return model
