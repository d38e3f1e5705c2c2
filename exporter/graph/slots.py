"""A slot: one matrix of the graph, where its values come from and the initializers they fill.

The graph is built with slots alone; weights are read, matrix by matrix, only when the package is
written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.model.storage import Blocks, Float, Storage

FLOATS = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_SIGNED = {8: ir.DataType.INT8, 4: ir.DataType.INT4}


@dataclass(frozen=True)
class Initializer:
    """Name, type and shape of one initializer."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the data file."""
        return math.ceil(math.prod(self.shape) * self.dtype.itemsize)


@dataclass(frozen=True)
class Slot:
    """One matrix (or norm gain) of the graph.

    `sources` are Hugging Face tensor names, concatenated along rows; `shape` is the result's.
    A slot with `table` takes its values from there instead (the rotary tables). `gathered`: its
    codes are read by `GatherBlockQuantized`, which wants them [rows, bytes] rather than
    [rows, blocks, bytes].
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    storage: Storage
    table: npt.NDArray[np.float32] | None = None
    gathered: bool = False

    def initializers(self) -> tuple[Initializer, ...]:
        """The initializers this slot fills, in the order of their bytes in the data file."""
        if isinstance(self.storage, Float):
            dtype = FLOATS[self.storage.name]
            return (Initializer(f"{self.name}.weight", dtype, self.shape),)
        if self.storage.columnwise:
            return self._columnwise(self.storage)
        rows, columns = self.shape
        blocks = self.storage.num_blocks(columns)
        width = self.storage.block_bytes
        codes = (rows, blocks * width) if self.gathered else (rows, blocks, width)
        found = [
            Initializer(f"{self.name}.qweight", ir.DataType.UINT8, codes),
            Initializer(f"{self.name}.scales", FLOATS[self.storage.scales], (rows, blocks)),
        ]
        if self.storage.zero_points:
            zeros = (rows, self.storage.zero_bytes(columns))
            found.append(Initializer(f"{self.name}.zero_points", ir.DataType.UINT8, zeros))
        if self.storage.order:
            found.append(Initializer(f"{self.name}.order", ir.DataType.INT64, (columns,)))
        return tuple(found)

    def _columnwise(self, storage: Blocks) -> tuple[Initializer, ...]:
        rows, columns = self.shape
        scales = (storage.num_blocks(columns), rows)
        return (
            Initializer(f"{self.name}.qweight", _SIGNED[storage.bits], (columns, rows)),
            Initializer(f"{self.name}.scales", FLOATS[storage.scales], scales),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its initializers."""
        return sum(initializer.nbytes for initializer in self.initializers())
