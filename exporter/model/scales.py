"""The scales of codes in blocks: the forms in which a file can hold them.

A plain form has the type that the operator reads. The others are smaller; the graph converts them
to float32 before the operator, and ONNX Runtime does so once, when it opens the package.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.targets.target import FloatName

ScaleForm = Literal["plain", "fp16", "uint8"]
"""`plain`: of the type that the operator reads. `fp16`: rounded to 11 bits. `uint8`: one number per
block, from 0 to 255, times one factor per row."""

SCALES, ROW_SCALES = "scales", "row_scales"

ROW_DTYPE: FloatName = "bf16"
"""Type of a row's factor. It is about 1/255 of a scale: fp16 holds numbers below 6e-5 with fewer
bits, and the scales of most models are below 255 times that. bf16 has the range of float32; its 8
bits are as many as the numbers per block have."""

_MOST = 255  # of the numbers per block

Array = npt.NDArray[Any]
ScalePart = tuple[str, str, tuple[int, ...]]
"""Name, type and shape of an array of scales."""


def scale_parts(form: ScaleForm, dtype: FloatName, rows: int, blocks: int) -> list[ScalePart]:
    """Return the arrays that hold scales [rows, blocks] of `dtype` in `form`."""
    if form == "uint8":
        return [(SCALES, "uint8", (rows, blocks)), (ROW_SCALES, ROW_DTYPE, (rows, 1))]
    return [(SCALES, "fp16" if form == "fp16" else dtype, (rows, blocks))]


def split_scales(form: ScaleForm, dtype: FloatName, scales: Array) -> tuple[Array, ...]:
    """Return `scales` [R, blocks] as the arrays of `scale_parts`, each value rounded to the nearest
    one that `form` can hold. A value that is not finite, or too large, is not finite in them."""
    if form == "uint8":
        return _numbers_and_factors(scales.astype(np.float32, copy=False))
    to = np.dtype(DTYPES["fp16" if form == "fp16" else dtype])
    with np.errstate(over="ignore"):
        found = scales.astype(to, copy=False)
    if to == np.float32:
        return (found,)
    # The smallest number there is: a scale of 0 would lose the block.
    vanished = (found == 0) & (scales != 0)
    least = np.copysign(_least(to), scales.astype(np.float32, copy=False)).astype(to)
    return (np.where(vanished, least, found),)


def representable(form: ScaleForm, dtype: FloatName, scales: Float32) -> Float32:
    """Return, for each of `scales` [R, blocks], the nearest one that `form` can hold; a scale above
    0 never becomes 0. What it returns it leaves unchanged.

    `uint8` holds no negative scale: it becomes 0.
    """
    first, *factors = split_scales(form, dtype, scales)
    values: Float32 = first.astype(np.float32)
    return values * factors[0].astype(np.float32) if factors else values


def _numbers_and_factors(scales: Float32) -> tuple[Array, Array]:
    """Return numbers uint8 [R, blocks] and factors [R, 1], whose products are close to `scales`.

    The largest scale of a row is always 255 times its factor, so that products are split into the
    same two again: they have 16 bits and are exact in float32.
    """
    to = np.dtype(DTYPES[ROW_DTYPE])
    largest = scales.max(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        factors = (largest / np.float32(_MOST)).astype(to)
        tiny = (largest > 0) & (factors == 0)
        factors = np.where(tiny, np.asarray(_least(to), to), factors)
        numbers = np.rint(scales / factors.astype(np.float32))
    present = scales > 0
    numbers = np.clip(np.nan_to_num(numbers), present, _MOST)
    return np.where(scales == largest, present * _MOST, numbers).astype(np.uint8), factors


def _least(dtype: np.dtype[Any]) -> np.float32:
    """Return the smallest number above 0 of a half-precision `dtype`."""
    return np.float32(np.array([1], np.uint16).view(dtype)[0])
