"""Round to nearest, symmetric: the step of a block is set by its largest value, nothing else.

value = (code - 2^(bits-1)) * scale as `com.microsoft.MatMulNBits` reads it. The scale puts the
block's largest magnitude, with its sign, exactly on code 0 (that is -2^(bits-1)), where the range
is one code longer: the step is finer than the largest value over 2^(bits-1) - 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.quantize.recipe import Blocks

Codes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


def quantize_rows(rows: Float32, storage: Blocks) -> tuple[Codes, Float32]:
    """Quantize `rows` [R, K] float32.

    Returns packed codes [R, blocks, block bytes] (low nibble first for four bits) and scales
    [R, blocks] float32. A partial last block is filled with the zero code. A NaN or infinity in a
    block makes its scale non-finite: the caller checks the scales.
    """
    count, columns = rows.shape
    blocks = storage.num_blocks(columns)
    if columns % storage.block_size:
        rows = np.pad(rows, ((0, 0), (0, blocks * storage.block_size - columns)))
    values = rows.reshape(count * blocks, storage.block_size)
    half = 1 << (storage.bits - 1)
    across = np.ascontiguousarray(values.T)  # the longest axis last: several times faster to reduce
    highest, lowest = across.max(axis=0), across.min(axis=0)
    extreme = np.where(highest > -lowest, highest, lowest)
    scales = extreme / np.float32(-half)
    with np.errstate(all="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
        shifted = values * inverse[:, None]
        shifted += np.float32(half + 0.5)
        # Adding one half and truncating is rounding; the code past the end is cut off.
        codes = np.minimum(shifted.astype(np.uint16), 2 * half - 1).astype(np.uint8)
    if storage.bits == 4:
        pairs = codes.view("<u2")  # the first of two codes is the low byte, and the low nibble
        codes = (pairs | pairs >> 4).astype(np.uint8)
    return (
        codes.reshape(count, blocks, storage.block_bytes),
        scales.astype(np.float32, copy=False).reshape(count, blocks),
    )
