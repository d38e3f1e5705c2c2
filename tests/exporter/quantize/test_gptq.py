"""GPTQ against least squares solved anew for each column, and against onnxruntime's quantizers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from onnxruntime.quantization.neural_compressor import weight_only

from llama_onnx.exporter.model.storage import Quantized, RowBlocks
from llama_onnx.exporter.quantize.awq import ActivationAware
from llama_onnx.exporter.quantize.base import CalibratedQuantizer
from llama_onnx.exporter.quantize.gptq import Gptq, inverse_factor, round_columns
from llama_onnx.exporter.quantize.inputs import Inputs

Array = npt.NDArray[np.float64]

ROWS, COLUMNS, TOKENS, MOST = 12, 32, 400, 15


@pytest.fixture(scope="module")
def tokens() -> Array:
    random = np.random.default_rng(2)
    mixed = random.standard_normal((TOKENS, COLUMNS)) @ random.standard_normal((COLUMNS, COLUMNS))
    found: Array = mixed * np.exp(random.normal(0, 0.5, COLUMNS))
    return found


@pytest.fixture(scope="module")
def matrix() -> Array:
    return np.random.default_rng(3).standard_t(4, (ROWS, COLUMNS)) * 0.05


def products_of(tokens: Array, damping: float = 0.0) -> Array:
    found = tokens.T @ tokens / len(tokens)
    damped: Array = found + damping * np.diag(found).mean() * np.eye(COLUMNS)
    return damped


def solved_anew(
    matrix: Array, products: Array, order: npt.NDArray[np.int64], steps: Array, zeros: Array
) -> npt.NDArray[np.int64]:
    """Round one column after another; after each, set the others to what least squares says.

    The error of the outputs is d H d^T for a change d of a row. With the changes of the rounded
    columns given, the best changes of the others solve H_oo d_o = -H_or d_r.
    """
    codes = np.zeros(matrix.shape, np.int64)
    changed, rounded = matrix.copy(), list[int]()
    for column in order:
        code = np.clip(np.rint(changed[:, column] / steps[:, column] + zeros[:, column]), 0, MOST)
        codes[:, column] = code
        changed[:, column] = (code - zeros[:, column]) * steps[:, column]
        rounded.append(int(column))
        others = [int(c) for c in order if int(c) not in rounded]
        if others:
            given = changed[:, rounded] - matrix[:, rounded]
            right = -products[np.ix_(others, rounded)] @ given.T
            changes = np.linalg.solve(products[np.ix_(others, others)], right)
            changed[:, others] = matrix[:, others] + changes.T
    return codes


def test_columns_are_rounded_as_if_least_squares_were_solved_after_each(
    matrix: Array, tokens: Array
) -> None:
    damping = 0.01
    lowest, highest = matrix.min(axis=1), matrix.max(axis=1)
    steps = np.repeat(((highest - lowest) / MOST)[:, None], COLUMNS, axis=1)
    zeros = np.rint(-lowest[:, None] / steps)
    plain = products_of(tokens).astype(np.float32)
    order, factor = inverse_factor(plain.copy(), 1.0, damping)
    columns, scales, points = (
        torch.from_numpy(np.ascontiguousarray(part.T[order], np.float32))
        for part in (matrix, steps, zeros)
    )
    found = np.empty((COLUMNS, ROWS), np.uint8)
    found[order] = round_columns(columns, scales, points, factor, MOST)
    expected = solved_anew(matrix, products_of(tokens, damping), order, steps, zeros)
    # In float32 a row may part at a near-tie, and then for good.
    assert np.equal(found.T, expected).mean() > 0.99
    nearest = np.clip(np.rint(matrix / steps + zeros), 0, MOST)
    assert np.equal(nearest, expected).mean() < 0.9, "the errors of other columns count"


def loss(found: Array, matrix: Array, tokens: Array) -> float:
    """The mean square error of the outputs."""
    return float((((found - matrix) @ tokens.T) ** 2).mean())


def values(found: Quantized) -> Array:
    assert found.zero_points is not None
    blocks = found.codes.reshape(*found.scales.shape, -1).astype(float)
    zeros, scales = found.zero_points[..., None], found.scales[..., None]
    return np.asarray((blocks - zeros) * scales, np.float64).reshape(ROWS, -1)


def onnxruntimes(matrix: Array, tokens: Array, size: int) -> dict[str, Array]:
    """The values that onnxruntime's own quantizers give the matrix."""
    columns = matrix.T.copy()
    found = {
        "gptq": weight_only.gptq(columns.copy(), products_of(tokens), group_size=size),
        "gptq, mse": weight_only.gptq(
            columns.copy(), products_of(tokens), group_size=size, mse=True
        ),
        "rtn": weight_only.qdq_tensor(columns.copy(), group_size=size, scheme="asym"),
    }
    blocks = matrix.reshape(-1, size)
    codes, scales, zeros = weight_only.quant_tensor_k_quant_cpu(blocks.copy(), group_size=size)
    found["k_quant"] = ((codes.astype(float) - zeros) * scales).reshape(matrix.shape).T
    return {name: np.asarray(value.T, np.float64) for name, value in found.items()}


@pytest.mark.parametrize("size", [16, 32])
def test_they_lose_less_than_onnxruntimes_quantizers(
    matrix: Array, tokens: Array, size: int
) -> None:
    products = products_of(tokens).astype(np.float32)
    squares, storage = products.diagonal().copy(), RowBlocks(4, size, zero_points=True)

    def loss_of(quantizer: CalibratedQuantizer) -> float:
        bound = quantizer.with_inputs(Inputs(squares, products.copy()))
        return loss(values(bound.quantize(matrix.astype(np.float32), storage)), matrix, tokens)

    least = min(
        loss(found, matrix, tokens) for found in onnxruntimes(matrix, tokens, size).values()
    )
    assert loss_of(Gptq(shrink=1.0)) < loss_of(ActivationAware()) < least
