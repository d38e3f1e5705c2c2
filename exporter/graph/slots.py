"""A slot: one matrix of the graph, the source of its values and the initializers they fill.

The graph is built from slots only; weights are read, matrix by matrix, when the package is
written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.graph.names import initializer_name
from llama_onnx.exporter.model.storage import Storage

DATA_TYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "uint8": ir.DataType.UINT8,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "int64": ir.DataType.INT64,
}
"""ONNX's types by their names in a storage."""


@dataclass(frozen=True)
class Initializer:
    """Name, type and shape of one initializer; `part` is its name within its matrix."""

    name: str
    part: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the data file."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)


@dataclass(frozen=True)
class Slot:
    """One matrix (or norm gain) of the graph.

    `sources` are the Hugging Face names of tensors that are concatenated along rows; `shape` is the
    shape of the result. A slot with a `table` has its values from there instead (rotary tables).
    `gathered`: `GatherBlockQuantized` reads it row by row. `keeps_codes`: the sources are already
    quantized, and their codes are stored unchanged.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    storage: Storage
    table: npt.NDArray[np.float32] | None = None
    gathered: bool = False
    keeps_codes: bool = False

    def initializers(self) -> tuple[Initializer, ...]:
        """Return the initializers this slot fills, in the order of their bytes in the data file."""
        parts = self.storage.parts(self.shape, gathered=self.gathered)
        return tuple(
            Initializer(initializer_name(self.name, p.name), p.name, DATA_TYPES[p.dtype], p.shape)
            for p in parts
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its initializers."""
        return sum(initializer.nbytes for initializer in self.initializers())
