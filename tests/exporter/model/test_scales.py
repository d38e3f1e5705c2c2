"""The forms in which a file holds scales, against numpy's own types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.scales import ScaleForm
from llama_onnx.exporter.model.storage import Quantized, RowBlocks, pack
from llama_onnx.runtime.measure.block_codes import dequantize
from llama_onnx.targets.target import FloatName

STORAGES = [
    RowBlocks(4, 32),
    RowBlocks(4, 32, scales="fp16"),
    RowBlocks(4, 32, scales="bf16"),
    RowBlocks(4, 32, stored_scales="fp16"),
    RowBlocks(4, 32, stored_scales="uint8"),
]
POSITIVE = arrays.arrays(
    np.float32, (3, 5), elements=st.floats(2.0**-30, 2.0**10, width=32) | st.just(0.0)
)


def held(storage: RowBlocks, scales: Float32) -> Float32:
    """Return the scales in the arrays that the file has of `scales`."""
    first, *factors = storage.stored(scales)
    values: Float32 = first.astype(np.float32)
    return values * factors[0].astype(np.float32) if factors else values


@pytest.mark.parametrize("storage", STORAGES, ids=repr)
@given(scales=POSITIVE)
@settings(max_examples=100)
def test_what_is_representable_is_stored_exactly_and_stays(
    storage: RowBlocks, scales: Float32
) -> None:
    found = storage.representable(scales)
    np.testing.assert_array_equal(held(storage, found), found)
    np.testing.assert_array_equal(storage.representable(found), found)
    np.testing.assert_array_equal(found > 0, scales > 0)


@pytest.mark.parametrize(("form", "dtype"), [("plain", "fp16"), ("fp16", "fp32")])
@given(scales=POSITIVE)
@settings(max_examples=100)
def test_half_precision_is_rounded_to_nearest(
    form: ScaleForm, dtype: FloatName, scales: Float32
) -> None:
    found = RowBlocks(4, 32, scales=dtype, stored_scales=form).representable(scales)
    nearest = scales.astype(np.float16).astype(np.float32)
    smallest = np.float32(np.finfo(np.float16).smallest_subnormal)
    expected = np.where((scales > 0) & (nearest == 0), smallest, nearest)
    np.testing.assert_array_equal(found, expected)


@given(scales=POSITIVE)
@settings(max_examples=200)
def test_numbers_per_block_are_the_nearest_for_their_row(scales: Float32) -> None:
    """No number from 0 to 255 is nearer, and the factor rounds the largest scale by 2^-8 at most.
    A scale of 0 stays 0, and no other becomes 0."""
    storage = RowBlocks(4, 32, stored_scales="uint8")
    numbers, factors = storage.stored(scales)
    assert numbers.dtype == np.uint8 and factors.dtype == ml_dtypes.bfloat16
    factor = factors.astype(np.float64)
    largest = scales.max(axis=1, keepdims=True)
    assert (np.abs(255 * factor - largest) <= largest * 2**-8).all()
    every = np.arange(256) * factor[..., None]  # [rows, 1, 256]
    distance = np.abs(every - scales[..., None])
    allowed = np.where(scales[..., None] > 0, np.arange(256) > 0, np.arange(256) == 0)
    best = np.where(allowed, distance, np.inf).min(axis=2)
    found = np.abs(numbers * factor - scales)
    is_largest = scales == largest
    np.testing.assert_array_less(found[~is_largest], best[~is_largest] * (1 + 1e-6) + 1e-45)


def test_small_scales_keep_their_precision() -> None:
    """As those of 8-bit codes are: a factor in fp16 would have four bits left."""
    scales = np.random.default_rng(0).uniform(1e-4, 3e-4, (50, 20)).astype(np.float32)
    found = RowBlocks(8, 32, stored_scales="uint8").representable(scales)
    assert (np.abs(found / scales - 1)).max() < 2**-6.4


@pytest.mark.parametrize("storage", STORAGES, ids=repr)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(storage: RowBlocks, value: float) -> None:
    scales = np.ones((2, 3), np.float32)
    scales[1, 1] = value
    stored = [array for array in storage.stored(scales) if array.dtype != np.uint8]
    assert not all(np.isfinite(array).all() for array in stored)


def test_negative_scales_are_kept_where_they_can_be() -> None:
    scales = np.array([[-0.5, 1e-9, -1e-9]], np.float32)
    np.testing.assert_array_equal(RowBlocks(4, 32).representable(scales), scales)
    half: Any = RowBlocks(4, 32, stored_scales="fp16").representable(scales)
    assert half[0, 0] == -0.5 and half[0, 1] > 0 > half[0, 2]


@pytest.mark.parametrize("columns", [128, 72])
@pytest.mark.parametrize("zero_points", [False, True])
def test_codes_of_two_bits_are_packed_as_the_operators_read_them(
    columns: int, zero_points: bool
) -> None:
    """Against arithmetic: byte = c0 + 4 c1 + 16 c2 + 64 c3."""
    storage = RowBlocks(2, 32, zero_points=zero_points)
    random, blocks = np.random.default_rng(0), storage.num_blocks(columns)
    codes = random.integers(0, 4, (5, blocks * 32), np.uint8)
    scales = random.uniform(1, 2, (5, blocks)).astype(np.float32)
    zeros = random.integers(0, 4, (5, blocks), np.uint8) if zero_points else None
    arrays_ = storage.encoded(Quantized(codes, scales, zeros))
    for part, array in zip(storage.parts((5, columns)), arrays_, strict=True):
        assert array.shape == part.shape
    np.testing.assert_array_equal(
        arrays_[0].reshape(5, -1), codes.reshape(5, -1, 4) @ np.array([1, 4, 16, 64], np.uint8)
    )
    middle = 2 if zeros is None else np.repeat(zeros, 32, axis=1).astype(np.float32)
    expected = (codes - np.float32(1) * middle) * np.repeat(scales, 32, axis=1)
    packed = arrays_[2] if zero_points else None
    found = dequantize(arrays_[0], scales, 2, 32, columns, packed)
    np.testing.assert_array_equal(found, expected[:, :columns])


def test_three_codes_of_two_bits_are_filled_up() -> None:
    assert pack(np.array([1, 2, 3, 0, 3], np.uint8), 2).tolist() == [0b111001, 0b11]
