"""What each kind of storage writes, against the operators' specifications and numpy itself."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from llama_onnx.exporter.formats.tensor import BlockCodes, Float32, LazyTensor, float_step
from llama_onnx.exporter.model.storage import (
    Blocks,
    ColumnBlocks,
    Floats,
    Quantized,
    RowBlocks,
    Storage,
    pack,
)
from llama_onnx.runtime.measure.block_codes import dequantize
from llama_onnx.targets.errors import UnsupportedError


def asymmetric(rows: Float32, storage: Blocks) -> Quantized:
    """A quantizer with zero points: codes from a block's lowest value to its highest."""
    blocks = storage.num_blocks(rows.shape[1])
    wide = np.pad(rows, ((0, 0), (0, blocks * storage.block_size - rows.shape[1])))
    values = wide.reshape(len(rows), blocks, storage.block_size).astype(np.float64)
    top = (1 << storage.bits) - 1
    low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
    scales = ((high - low) / top).astype(np.float32)
    zeros = np.rint(-low / scales)
    codes = np.clip(np.rint(values / scales[..., None]) + zeros[..., None], 0, top)
    return Quantized(codes.reshape(len(rows), -1).astype(np.uint8), scales, zeros.astype(np.uint8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [96, 72])  # three blocks: the zero points end in half a byte
def test_zero_points_of_a_quantizer_are_stored_as_the_operators_read_them(
    bits: int, columns: int
) -> None:
    rows = np.random.default_rng(0).uniform(1, 3, (5, columns)).astype(np.float32)
    storage = RowBlocks(bits, 32, zero_points=True)
    codes, scales, zeros = storage.encode(rows, asymmetric)
    for part, array in zip(storage.parts(rows.shape), (codes, scales, zeros), strict=True):
        assert array.shape == part.shape, part.name
    restored = dequantize(codes, scales, bits, 32, columns, zeros)
    assert np.abs(restored - rows).max() <= 0.51 * scales.max()


@pytest.mark.parametrize("storage", [Floats("fp16"), RowBlocks(4, 32), ColumnBlocks(8, 32)])
def test_only_what_is_quantized_in_columns_is_held_whole(storage: Storage) -> None:
    assert storage.joined_values((6, 32)) == (192 if isinstance(storage, ColumnBlocks) else 0)


def test_the_json_of_a_storage_keeps_its_keys() -> None:
    """Packages made before have them in their manifests."""
    assert Floats("bf16").to_json() == {"name": "bf16"}
    same = {"bits": 4, "block_size": 32, "zero_points": False, "order": "", "scales": "fp16"}
    same["stored_scales"] = "plain"
    assert RowBlocks(4, 32, scales="fp16").to_json() == {**same, "columnwise": False}
    assert ColumnBlocks(4, 32, scales="fp16").to_json() == {**same, "columnwise": True}


def test_an_odd_number_of_codes_is_filled_up() -> None:
    assert pack(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(np.array([1, 2, 3], np.uint8), 8).tolist() == [1, 2, 3]


def tensor(dtype: str, codes: BlockCodes | None = None) -> LazyTensor:
    return LazyTensor("w", (1, 4), dtype, 16, lambda a, b: np.zeros((1, 4), np.float32), codes)


@pytest.mark.parametrize(
    ("code", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F32", None)]
)
def test_the_step_of_floats_is_the_distance_to_the_next_one(
    code: str, dtype: npt.DTypeLike | None
) -> None:
    values = np.array([[1.0, -1.5, 0.3, 1000.0]], np.float32)
    step = tensor(code).step(values)
    if dtype is None:
        assert not step.any()
        return
    held = np.abs(values.astype(dtype))
    bits = held.view(np.uint16) + np.uint16(1)  # the next number up, by its bits
    above: npt.NDArray[Any] = bits.view(dtype)
    np.testing.assert_array_equal(step, above.astype(np.float32) - held.astype(np.float32))
    np.testing.assert_array_equal(step, float_step(values, np.dtype(dtype)))


def test_the_step_of_codes_is_set_by_the_largest_of_the_block() -> None:
    values = np.array([[1, -8, 2, 3, 5, -4]], np.float32)
    step = tensor("INT4/4", BlockCodes(4, 4)).step(values)
    np.testing.assert_allclose(step, [[1, 1, 1, 1, 5 / 8, 5 / 8]])


def test_what_has_no_one_step_says_so() -> None:
    with pytest.raises(UnsupportedError, match="Q4_K"):
        tensor("Q4_K").step(np.zeros((1, 4), np.float32))
