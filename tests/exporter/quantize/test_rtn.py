"""Round to nearest: what comes back is the nearest code, for any shape and any value."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.quantize.rtn import RoundToNearest
from llama_onnx.targets.target import FloatName

Float32 = npt.NDArray[np.float32]

STORAGES = [RowBlocks(bits, size) for bits in (4, 8) for size in (16, 32, 128)]


def quantize_rows(rows: Float32, storage: RowBlocks) -> tuple[npt.NDArray[np.uint8], Any]:
    """Packed codes and scales, as they are stored."""
    codes, scales = storage.encode(rows, RoundToNearest().quantize)
    return codes, scales


def dequantize(codes: npt.NDArray[np.uint8], scales: Any, storage: RowBlocks) -> Float32:
    """The operators' own formula, written out plainly."""
    if storage.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    wide = scales.astype(np.float32)[..., None]
    values: Float32 = (codes.astype(np.float32) - (1 << (storage.bits - 1))) * wide
    return values.reshape(len(codes), -1)


rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 300)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@given(rows=rows, storage=st.sampled_from(STORAGES))
def test_every_value_is_within_half_a_step(rows: Float32, storage: RowBlocks) -> None:
    codes, scales = quantize_rows(rows, storage)
    columns = rows.shape[1]
    assert codes.shape == (len(rows), storage.num_blocks(columns), storage.block_bytes)
    restored = dequantize(codes, scales, storage)[:, :columns]
    stored = scales.astype(np.float32)
    step = np.abs(np.repeat(stored, storage.block_size, axis=1)[:, :columns])
    # The one code that lacks on the far side may cost up to a whole step.
    far = np.sign(rows) != -np.sign(np.repeat(stored, storage.block_size, axis=1)[:, :columns])
    bound = np.where(far, 1.0, 0.5) * step
    assert (np.abs(rows - restored) <= bound * (1 + 1e-4) + 1e-30).all()


@given(rows=rows, storage=st.sampled_from(STORAGES))
def test_the_largest_value_of_a_block_is_exact(rows: Float32, storage: RowBlocks) -> None:
    codes, scales = quantize_rows(rows, storage)
    restored = dequantize(codes, scales, storage)[:, : storage.block_size]
    first = rows[:, : storage.block_size]
    # Of two that are equal but for their sign, one is.
    np.testing.assert_allclose(np.abs(restored).max(axis=1), np.abs(first).max(axis=1), rtol=1e-6)


@pytest.mark.parametrize(("scales", "digits"), [("fp16", 11), ("bf16", 8)])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_chosen_for_the_scale_that_is_stored(
    bits: int, scales: FloatName, digits: int
) -> None:
    """Rounded to so many digits, the scale costs its own error at the end of the range, no more."""
    storage = RowBlocks(bits, 32, scales=scales)
    rows = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    codes, found = quantize_rows(rows, storage)
    assert found.dtype == DTYPES[scales]
    restored = dequantize(codes, found, storage)
    step = np.repeat(np.abs(found.astype(np.float32)), 32, axis=1)
    ends = np.abs(rows) >= step * ((1 << (bits - 1)) - 0.5)
    error = np.abs(rows - restored) / step
    assert error[~ends].max() <= 0.5 + 1e-4
    assert error[ends].max() <= 1 + 2.0 ** (bits - 1 - digits)


def test_a_scale_too_large_for_its_type_is_not_finite() -> None:
    rows = np.full((1, 32), 1e6, np.float32)
    assert np.isinf(
        quantize_rows(rows, RowBlocks(4, 32, scales="fp16"))[1].astype(np.float32)
    ).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_padding_of_a_partial_block_is_zero(storage: RowBlocks) -> None:
    rows = np.ones((2, storage.block_size + 8), np.float32)
    restored = dequantize(*quantize_rows(rows, storage), storage)
    assert not restored[:, storage.block_size + 8 :].any()


def test_zeros_stay_zeros() -> None:
    storage = RowBlocks(4, 32)
    restored = dequantize(*quantize_rows(np.zeros((2, 64), np.float32), storage), storage)
    assert not restored.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_shows_in_the_scale(bad: float) -> None:
    rows = np.ones((1, 64), np.float32)
    rows[0, 40] = bad
    _, scales = quantize_rows(rows, RowBlocks(4, 32))
    assert np.isfinite(scales).tolist() == [[True, False]]
