"""Round to nearest, symmetric: the step of a block is set by its largest value, nothing else.

value = (code - 2^(bits-1)) * scale as `com.microsoft.MatMulNBits` reads it. The scale puts the
block's largest magnitude, with its sign, exactly on code 0 (that is -2^(bits-1)), where the range
is one code longer: the step is finer than the largest value over 2^(bits-1) - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.exporter.model.storage import Blocks, Quantized


@dataclass(frozen=True)
class RoundToNearest:
    """A `Quantizer` that looks at one block at a time."""

    name: str = "rtn"
    calibrates: bool = False

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        """Quantize `rows` [R, K] without zero points; a partial last block is filled up with the
        code of zero."""
        count, columns = rows.shape
        blocks = storage.num_blocks(columns)
        if columns % storage.block_size:
            rows = np.pad(rows, ((0, 0), (0, blocks * storage.block_size - columns)))
        values = rows.reshape(count * blocks, storage.block_size)
        half = 1 << (storage.bits - 1)
        # The longest axis last: several times faster to reduce.
        across = np.ascontiguousarray(values.T)
        highest, lowest = across.max(axis=0), across.min(axis=0)
        extreme = np.where(highest > -lowest, highest, lowest)
        with np.errstate(all="ignore"):
            scales = (extreme / np.float32(-half)).astype(DTYPES[storage.scales])
            stored = scales.astype(np.float32)  # what the codes are multiplied by
            inverse = np.where(stored == 0, np.float32(0), np.float32(1) / stored)
            shifted = values * inverse[:, None]
            shifted += np.float32(half + 0.5)
            if storage.scales != "fp32":  # rounded, so a value may lie beyond the lower end too
                np.maximum(shifted, 0, out=shifted)
            # Adding one half and truncating is rounding; the code past the end is cut off.
            codes = np.minimum(shifted.astype(np.uint16), 2 * half - 1).astype(np.uint8)
        return Quantized(codes.reshape(count, -1), scales.reshape(count, blocks))
