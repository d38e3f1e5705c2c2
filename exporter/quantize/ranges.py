"""The scale and zero point of each block that lose least, weighted by the inputs.

For codes c of weights w, the error of the matrix's output is about sum_k E[x_k^2] (w_k - s c_k)^2
(the Hessian's diagonal, as in GPTQ, Frantar et al., 2022, and AWQ, Lin et al., 2023). Several
ranges are tried for each block. For given codes the best scale has a closed form, s = sum(h w c) /
sum(h c^2), and the error is then sum(h w^2) - sum(h w c)^2 / sum(h c^2).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.storage import Blocks, Quantized, RowBlocks

SHRINKS = (1.04, 0.976, 0.912, 0.848, 0.784, 0.72)
"""Ranges to try, relative to that of the block's values; the first one clips nothing."""

_CHUNK_VALUES = 1 << 18
_SMALLEST = np.float32(1e-12)

Grid = tuple[Float32, Float32]
"""Scales and zero points (whole numbers), each [R, blocks]."""


def blocks_first(rows: Float32, storage: Blocks) -> Float32:
    """Return `rows` [R, K] as [block_size, R, blocks], padded with zeros; reducing over the first
    axis is several times faster than over the last."""
    size = storage.block_size
    padding = storage.num_blocks(rows.shape[1]) * size - rows.shape[1]
    if padding:
        rows = np.pad(rows, ((0, 0), (0, padding)))
    return np.ascontiguousarray(rows.reshape(len(rows), -1, size).transpose(2, 0, 1))


def search_grid(rows: Float32, weights: Float32, storage: Blocks) -> Grid:
    """Return scales that the storage can hold, and zero points, for `rows` [R, K].

    `weights` [K] are the mean squares of the inputs.
    """
    parts = [
        _search(blocks_first(part, storage), weights, storage)
        for part in row_chunks(rows, _CHUNK_VALUES)
    ]
    scales, zeros = (np.concatenate(column) for column in zip(*parts, strict=True))
    return representable(scales, storage), zeros


def row_chunks(rows: Float32, values: int) -> Iterator[Float32]:
    """Yield `rows` [R, K] in pieces of at most `values` values, each at least one row."""
    step = max(1, values // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def representable(scales: Float32, storage: Blocks) -> Float32:
    """Return the scales nearest to `scales` that `storage` can hold, as float32."""
    if isinstance(storage, RowBlocks):
        return storage.representable(scales)
    from llama_onnx.exporter.model.dtypes import DTYPES

    return scales.astype(DTYPES[storage.scales]).astype(np.float32)


def nearest_codes(rows: Float32, grid: Grid, storage: Blocks) -> npt.NDArray[np.uint8]:
    """Return the codes [R, blocks * block_size] nearest to `rows` [R, K] on `grid`."""
    scales, zeros = (part[..., None] for part in grid)
    size, most = storage.block_size, (1 << storage.bits) - 1
    padding = storage.num_blocks(rows.shape[1]) * size - rows.shape[1]
    found = np.empty((len(rows), storage.num_blocks(rows.shape[1]) * size), np.uint8)
    start = 0
    for part in row_chunks(rows, _CHUNK_VALUES):
        stop = start + len(part)
        blocks = np.pad(part, ((0, 0), (0, padding))).reshape(len(part), -1, size)
        values = np.rint(blocks / scales[start:stop] + zeros[start:stop])
        found[start:stop] = np.clip(values, 0, most).reshape(len(part), -1)
        start = stop
    return found


def quantized(codes: npt.NDArray[np.uint8], grid: Grid, storage: Blocks) -> Quantized:
    """Return `codes` and `grid` as a storage takes them."""
    scales, zeros = grid
    points = zeros.astype(np.uint8) if has_zero_points(storage) else None
    return Quantized(codes, scales, points)


def dequantized(codes: npt.NDArray[np.uint8], grid: Grid, columns: int) -> Float32:
    """Return the values [R, columns] of `codes` on `grid`."""
    scales, zeros = grid
    blocks = codes.reshape(*scales.shape, -1).astype(np.float32)
    values: Float32 = ((blocks - zeros[..., None]) * scales[..., None]).reshape(len(codes), -1)
    return values[:, :columns]


def has_zero_points(storage: Blocks) -> bool:
    """Return whether `storage` keeps a zero point for each block."""
    return isinstance(storage, RowBlocks) and storage.zero_points


def _search(blocks: Float32, weights: Float32, storage: Blocks) -> Grid:
    """Return the best scales and zero points of `blocks` [size, R, blocks]."""
    h = blocks_first(weights[None], storage)  # [size, 1, blocks]
    hw = h * blocks
    shape = blocks.shape[1:]
    best, scales = np.full(shape, -1, np.float32), np.full(shape, _SMALLEST)
    zeros = np.full(shape, 1 << (storage.bits - 1), np.float32)
    most = np.float32((1 << storage.bits) - 1)
    codes = np.empty_like(blocks)
    for scale, zero in _candidates(blocks, storage):
        for _ in range(2):  # the second time with the best scale of the first one's codes
            np.divide(blocks, scale, out=codes)
            codes += zero
            np.rint(codes, out=codes)
            np.clip(codes, 0, most, out=codes)
            codes -= zero
            product = np.einsum("krb,krb->rb", codes, hw)
            power = np.einsum("krb,krb,kb->rb", codes, codes, h[:, 0])
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = np.where(power > 0, product / power, scale)
            gain = np.where(power > 0, product * scale, np.float32(0))  # how much error it removes
            better = (gain > best) & (np.abs(scale) >= _SMALLEST)
            best = np.where(better, gain, best)
            scales = np.where(better, scale, scales)
            zeros = np.where(better, zero, zeros)
            scale = np.where(np.abs(scale) < _SMALLEST, _SMALLEST, scale)
    return scales, zeros


def _candidates(blocks: Float32, storage: Blocks) -> Iterator[Grid]:
    """Yield scales and zero points [R, blocks] to start from."""
    high, low = np.maximum(blocks.max(axis=0), 0), np.minimum(blocks.min(axis=0), 0)
    most, half = (1 << storage.bits) - 1, 1 << (storage.bits - 1)
    shrinks = SHRINKS if storage.bits < 8 else (1.0,)  # clipping costs more than 8 bits round
    if not has_zero_points(storage):
        # One more code below zero than above: the extreme, with its sign, maps onto code 0.
        extreme = np.where(high > -low, high, low)
        for shrink in shrinks:
            scale = extreme * np.float32(-shrink / half)
            yield _nonzero(scale), np.full_like(scale, half)
        return
    for shrink in shrinks:
        scale = _nonzero((high - low) * np.float32(shrink / most))
        around_middle = np.clip(np.rint(most / 2 - (high + low) / 2 / scale), 0, most)
        yield scale, around_middle
        from_lowest = np.clip(np.rint(-low / scale), 0, most)
        if not np.array_equal(from_lowest, around_middle):
            yield scale, from_lowest


def _nonzero(scale: Float32) -> Float32:
    return np.where(np.abs(scale) < _SMALLEST, _SMALLEST, scale).astype(np.float32)
