"""Round to nearest, symmetric: the step of a block is set by its largest value, nothing else.

value = (code - 2^(bits-1)) * scale as `com.microsoft.MatMulNBits` reads it. The scale puts the
block's largest magnitude, with its sign, exactly on code 0 (that is -2^(bits-1)), where the range
is one code longer: the step is finer than the largest value over 2^(bits-1) - 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.exporter.model.storage import Blocks

Codes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Scales = npt.NDArray[np.generic]


def quantize_rows(rows: Float32, storage: Blocks) -> tuple[Codes, Scales]:
    """Quantize `rows` [R, K] float32.

    Returns packed codes [R, blocks, block bytes] (low nibble first for four bits) and scales
    [R, blocks] in the storage's type. A partial last block is filled with the zero code. A NaN or
    infinity in a block, or a value too large for the type of the scales, makes its scale
    non-finite: the caller checks the scales.
    """
    codes, scales = round_to_codes(rows, storage)
    return pack(codes, storage.bits).reshape(*scales.shape, storage.block_bytes), scales


def round_to_codes(rows: Float32, storage: Blocks) -> tuple[Codes, Scales]:
    """Codes [R, blocks * block_size], one a byte, and scales as `quantize_rows` has them."""
    count, columns = rows.shape
    blocks = storage.num_blocks(columns)
    if columns % storage.block_size:
        rows = np.pad(rows, ((0, 0), (0, blocks * storage.block_size - columns)))
    values = rows.reshape(count * blocks, storage.block_size)
    half = 1 << (storage.bits - 1)
    across = np.ascontiguousarray(values.T)  # the longest axis last: several times faster to reduce
    highest, lowest = across.max(axis=0), across.min(axis=0)
    extreme = np.where(highest > -lowest, highest, lowest)
    with np.errstate(all="ignore"):
        scales = (extreme / np.float32(-half)).astype(DTYPES[storage.scales])
        stored = scales.astype(np.float32)  # what the codes are multiplied by
        inverse = np.where(stored == 0, np.float32(0), np.float32(1) / stored)
        shifted = values * inverse[:, None]
        shifted += np.float32(half + 0.5)
        if storage.scales != "fp32":  # rounded, so that a value may lie beyond the lower end too
            np.maximum(shifted, 0, out=shifted)
        # Adding one half and truncating is rounding; the code past the end is cut off.
        codes = np.minimum(shifted.astype(np.uint16), 2 * half - 1).astype(np.uint8)
    return codes.reshape(count, -1), scales.reshape(count, blocks)


def pack(codes: Codes, bits: int) -> Codes:
    """Codes, one a byte, as `bits` each: of two of four bits the first is the low nibble."""
    if bits == 8:
        return codes
    pairs = np.ascontiguousarray(codes).view("<u2")
    return np.asarray((pairs | pairs >> 4).astype(np.uint8))
