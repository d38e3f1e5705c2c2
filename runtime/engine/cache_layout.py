"""What the cache of a graph consists of, read from the graph's own inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime import ort
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.graph_names import LOGITS, is_past

Buffers = Mapping[str, npt.NDArray[Any]]
"""`past_key_values.{i}.key` and `.value`, [rows, kv_heads, positions, head_size] each."""

Block = Mapping[str, npt.NDArray[Any]]
"""The keys and values of some positions of one row, [kv_heads, positions, head_size] each."""


@dataclass(frozen=True)
class CacheLayout:
    """The cache inputs of a graph: name -> heads, size of a head, and type.

    `vocab_size` is the width of the logits; `all_positions`: a step has logits for each of its
    positions, not for the last only.
    """

    parts: Mapping[str, tuple[int, int, type[np.generic]]]
    vocab_size: int
    all_positions: bool = True

    @classmethod
    def of(cls, session: ort.Session) -> CacheLayout:
        """Return the layout of an open graph; raise `PackageError` if it has no sizes."""
        parts = {
            entry.name: (entry.shape[1], entry.shape[3], ort.numpy_dtype(entry.type))
            for entry in session.get_inputs()
            if is_past(entry.name)
        }
        (logits,) = (o.shape for o in session.get_outputs() if o.name == LOGITS)
        vocab_size = logits[-1]
        sizes = [vocab_size, *(size for part in parts.values() for size in part[:2])]
        if not parts or not all(isinstance(size, int) for size in sizes):
            raise PackageError(
                "the graph does not say how large its cache and its logits are: export the "
                "package again."
            )
        return cls(parts, vocab_size, all_positions=logits[1] != 1)

    @property
    def position_bytes(self) -> int:
        """The bytes of all keys and values of one position of one row."""
        return sum(
            heads * size * np.dtype(kind).itemsize for heads, size, kind in self.parts.values()
        )

    def shapes(self, positions: int) -> dict[str, tuple[tuple[int, int, int], type[np.generic]]]:
        """Return the shape and the type of each part of a block of so many positions."""
        return {
            name: ((heads, positions, size), kind)
            for name, (heads, size, kind) in self.parts.items()
        }

    def zeros(self, name: str, rows: int, positions: int) -> npt.NDArray[Any]:
        """Return an empty buffer; its pages take no memory until they are written."""
        heads, size, kind = self.parts[name]
        return np.zeros((rows, heads, positions, size), kind)

    def buffers(self, rows: int, positions: int) -> dict[str, npt.NDArray[Any]]:
        """Return empty buffers for all layers."""
        return {name: self.zeros(name, rows, positions) for name in self.parts}
