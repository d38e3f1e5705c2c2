"""Distances of weights from their originals, by the definition: one weight, one block at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llama_onnx.exporter.formats.tensor import BlockCodes
from llama_onnx.exporter.parity.measure.weights import (
    _compare,
    _farthest,
    block_errors,
    block_means,
)
from llama_onnx.runtime.measure import block_codes
from llama_onnx.runtime.measure.block_codes import dequantize

CODES = [BlockCodes(4, 32), BlockCodes(8, 16), BlockCodes(2, 8), BlockCodes(4, 24)]
Found = tuple[np.ndarray, np.ndarray, Any, Any]


def pair(codes: BlockCodes, columns: int, error: float) -> Found:
    """Return rounded and original rows, and the tensors that they are of."""
    random = np.random.default_rng(codes.bits)
    original = random.standard_normal((6, columns), dtype=np.float32)
    original[2] = 0
    rows = original + np.float32(error) * random.standard_normal((6, columns), dtype=np.float32)
    rows[4, 3:5] = original[4, 3:5]
    rows[2] = 0  # a block of zeros must stay one
    tensors = (SimpleNamespace(codes=codes, step=codes.step), SimpleNamespace(codes=None))
    return rows, original, *tensors


def blocks(codes: BlockCodes, columns: int) -> list[slice]:
    size = codes.block_size
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("columns", [48, 96, 50])
@pytest.mark.parametrize("error", [0, 1e-3, math.nan])
def test_the_farthest_weight_and_the_worst_block_are_those_of_the_definition(
    codes: BlockCodes, columns: int, error: float
) -> None:
    rows, original, found, source = pair(codes, columns, error)
    steps, worst = [0.0], [0.0]
    for row in range(len(rows)):
        for block in blocks(codes, columns):
            ours, theirs = rows[row, block], original[row, block]
            largest = np.abs(theirs).max()
            for one, other in zip(ours, theirs, strict=True):
                distance = np.abs(one - other)
                step = np.float32(largest / 2 ** (codes.bits - 1))
                with np.errstate(divide="ignore"):
                    steps.append(0.0 if distance == 0 else float(distance / step))
            tied = np.abs(theirs) >= largest * np.float32(1 - 1e-5)
            worst.append(float(np.abs(ours - theirs)[tied].min() / max(largest, np.float32(1e-30))))
    assert _farthest(rows, original, found, source, None, "rtn") == pytest.approx(
        np.max(steps), rel=1e-6, nan_ok=True
    )
    assert block_errors(rows, original, codes).max() == pytest.approx(
        np.max(worst), rel=1e-6, nan_ok=True
    )


@pytest.mark.parametrize("codes", CODES, ids=str)
@pytest.mark.parametrize("columns", [48, 50])
def test_within_a_range_the_farthest_is_that_of_the_definition(
    codes: BlockCodes, columns: int
) -> None:
    rows, original, found, source = pair(codes, columns, 1e-2)
    count = codes.num_blocks(columns)
    low, high = np.full((6, count), -1, np.float32), np.full((6, count), 0.75, np.float32)
    low[4], high[4] = low[4] / 2, high[4] / 2
    low[:, 0], high[:, 0] = low[:, 0] / 8, high[:, 0] / 8
    own, of_row, means = [], [], np.zeros((6, count), np.float32)
    for row in range(len(rows)):
        steps = (high[row] - low[row]) / np.float32(2**codes.bits - 1)
        for index, block in enumerate(blocks(codes, columns)):
            clipped = np.clip(original[row, block], low[row, index], high[row, index])
            distances = np.abs(rows[row, block] - clipped)
            own.append(distances.max() / steps[index])
            of_row.append(distances.max() / steps.max())
            means[row, index] = ((distances / steps[index]) ** 2).mean()
    for quantizer, expected in (("awq", max(own)), ("gptq", max(of_row)), ("best", max(of_row))):
        farthest = _farthest(rows, original, found, source, (low, high), quantizer)
        assert farthest == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(block_means(rows, original, found, (low, high)), means, rtol=1e-4)


def test_one_wrong_weight_is_found_in_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are read and compared in pieces: none is left out."""
    from llama_onnx.exporter.parity.measure import weights

    monkeypatch.setattr(weights, "_CHUNK_VALUES", 7 * 64)
    monkeypatch.setattr(weights, "_PIECE_VALUES", 3 * 64)
    codes, original = CODES[0], np.ones((40, 64), np.float32)
    source = SimpleNamespace(codes=None, rows=lambda a, b: original[a:b], shape=original.shape)
    for row in range(len(original)):
        wrong = original.copy()
        wrong[row, 9] = 2
        found: Any = SimpleNamespace(
            codes=codes, step=codes.step, rows=lambda a, b, w=wrong: w[a:b], shape=wrong.shape,
            bounds=None,
        )  # fmt: skip
        distance = _compare(found, source, "rtn")  # type: ignore[arg-type]
        assert (distance.steps, distance.block_maximum) == (8.0, 0.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_codes_are_dequantized_as_the_operator_defines(
    bits: int, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code by code: packed from the low bits up, in pieces of a few rows."""
    monkeypatch.setattr(block_codes, "_PIECE", 100)
    random = np.random.default_rng(bits)
    rows, count, size, columns = 11, 3, 16, 41
    codes = random.integers(0, 256, (rows, count, size * bits // 8), np.uint8)
    scales = random.standard_normal((rows, count), dtype=np.float32)
    packed = random.integers(0, 256, (rows, -(-count * bits // 8)), np.uint8) if zeros else None
    found = dequantize(codes, scales, bits, size, columns, packed)
    flat = codes.reshape(rows, -1)
    for row in range(rows):
        for column in range(columns):
            block, bit = column // size, column * bits
            code = flat[row, bit // 8] >> (bit % 8) & (2**bits - 1)
            zero: int = 2 ** (bits - 1)
            if packed is not None:
                zero = packed[row, block * bits // 8] >> (block * bits % 8) & (2**bits - 1)
            expected = np.float32(int(code) - int(zero)) * scales[row, block]
            assert found[row, column] == expected
