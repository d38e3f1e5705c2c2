"""Symmetric round-to-nearest: only a block's largest magnitude determines its step.

value = (code - 2^(bits-1)) * scale as `com.microsoft.MatMulNBits` reads it. The scale maps the
value of largest magnitude, with its sign, exactly to code 0, that is to -2^(bits-1). The range has
one more code on that side, so the step is finer than the largest magnitude over 2^(bits-1) - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.storage import Blocks, Quantized
from llama_onnx.exporter.quantize.ranges import representable


@dataclass(frozen=True)
class RoundToNearest:
    """A `Quantizer` that treats each block separately."""

    name: str = "rtn"

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        """Return `rows` [R, K] quantized without zero points; a partial last block is padded with
        the code of zero."""
        count, columns = rows.shape
        blocks = storage.num_blocks(columns)
        if columns % storage.block_size:
            rows = np.pad(rows, ((0, 0), (0, blocks * storage.block_size - columns)))
        values = rows.reshape(count * blocks, storage.block_size)
        half = 1 << (storage.bits - 1)
        # Reducing is several times faster with the longest axis last.
        across = np.ascontiguousarray(values.T)
        highest, lowest = across.max(axis=0), across.min(axis=0)
        extreme = np.where(highest > -lowest, highest, lowest)
        with np.errstate(all="ignore"):
            steps = (extreme / np.float32(-half)).reshape(count, blocks)
            scales = representable(steps, storage)
            stored = scales.reshape(-1)  # what the codes are multiplied by
            inverse = np.where(stored == 0, np.float32(0), np.float32(1) / stored)
            shifted = values * inverse[:, None]
            shifted += np.float32(half + 0.5)
            np.maximum(shifted, 0, out=shifted)  # a rounded scale may put a value below the range
            # Adding one half and truncating rounds; a code above the range is clipped.
            codes = np.minimum(shifted.astype(np.uint16), 2 * half - 1).astype(np.uint8)
        return Quantized(codes.reshape(count, -1), scales)
