"""A slot: one matrix of the graph, where its values come from and the initializers they fill.

The graph is built with slots alone; weights are read, matrix by matrix, only when the package is
written.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.quantize.recipe import Blocks, Float, Storage

_FLOATS = {16: ir.DataType.FLOAT16, 32: ir.DataType.FLOAT}


@dataclass(frozen=True)
class Initializer:
    """Name, type and shape of one initializer."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the data file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """One matrix (or norm gain) of the graph.

    `sources` are Hugging Face tensor names, concatenated along rows; `shape` is that of the result.
    A slot with `table` takes its values from there instead (the rotary tables).
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    storage: Storage
    table: npt.NDArray[np.float32] | None = None

    def initializers(self) -> tuple[Initializer, ...]:
        """The initializers this slot fills, in the order of their bytes in the data file."""
        if isinstance(self.storage, Float):
            dtype = _FLOATS[self.storage.bits]
            return (Initializer(f"{self.name}.weight", dtype, self.shape),)
        rows, columns = self.shape
        blocks = self.storage.num_blocks(columns)
        return (
            Initializer(
                f"{self.name}.qweight",
                ir.DataType.UINT8,
                (rows, blocks, self.storage.block_bytes),
            ),
            Initializer(f"{self.name}.scales", ir.DataType.FLOAT, (rows, blocks)),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its initializers."""
        return sum(initializer.nbytes for initializer in self.initializers())


__all__ = ["Blocks", "Float", "Initializer", "Slot", "Storage"]
