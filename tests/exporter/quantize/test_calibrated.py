"""AWQ and GPTQ on one matrix, against other searches and by what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llama_onnx.exporter.model.channel_scales import exponents_of, scales_of
from llama_onnx.exporter.model.storage import Quantized, RowBlocks
from llama_onnx.exporter.quantize.awq import ActivationAware, channel_exponents
from llama_onnx.exporter.quantize.base import CalibratedQuantizer
from llama_onnx.exporter.quantize.gptq import Gptq
from llama_onnx.exporter.quantize.inputs import Collector, Inputs
from llama_onnx.exporter.quantize.rtn import RoundToNearest

ROWS, COLUMNS, TOKENS = 48, 96, 512
SYMMETRIC, ASYMMETRIC = RowBlocks(4, 32), RowBlocks(4, 32, zero_points=True)


@pytest.fixture(scope="module")
def matrix() -> np.ndarray:
    random = np.random.default_rng(0)
    return (random.standard_t(4, (ROWS, COLUMNS)) * 0.05).astype(np.float32)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Inputs of a matrix: correlated, and far larger in some channels."""
    random = np.random.default_rng(1)
    mixed = random.standard_normal((TOKENS, COLUMNS)) @ random.standard_normal((COLUMNS, COLUMNS))
    return (mixed * np.exp(random.normal(0, 1, COLUMNS)) / 10).astype(np.float32)


def inputs_of(tokens: np.ndarray) -> Inputs:
    collector = Collector(tokens.shape[1], correlates=True)
    for start in range(0, len(tokens), 100):
        collector.add(tokens[start : start + 100])
    return collector.inputs()


def values(found: Quantized, storage: RowBlocks) -> np.ndarray:
    zeros = found.zero_points
    points = 1 << (storage.bits - 1) if zeros is None else zeros[..., None].astype(np.float64)
    codes = found.codes.reshape(*found.scales.shape, -1).astype(float) - points
    return (codes * found.scales[..., None]).reshape(len(found.codes), -1)


def output_error(found: np.ndarray, matrix: np.ndarray, tokens: np.ndarray) -> float:
    """The relative error of the outputs, computed with the tokens themselves."""
    outputs, error = tokens @ matrix.T, tokens @ (found[:, : matrix.shape[1]] - matrix).T
    return float(np.linalg.norm(error) / np.linalg.norm(outputs))


def test_a_collector_adds_up_means(tokens: np.ndarray) -> None:
    found = inputs_of(tokens)
    np.testing.assert_allclose(found.squares, (tokens.astype(float) ** 2).mean(axis=0), rtol=1e-5)
    assert found.products is not None
    np.testing.assert_allclose(found.products, tokens.T @ tokens / TOKENS, rtol=1e-3, atol=1e-3)
    scales = np.exp(np.linspace(-1, 1, COLUMNS)).astype(np.float32)
    scaled = found.scaled(scales)
    np.testing.assert_allclose(scaled.squares, ((tokens / scales) ** 2).mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("storage", [SYMMETRIC, ASYMMETRIC])
def test_each_quantizer_loses_less_than_the_one_before(
    matrix: np.ndarray, tokens: np.ndarray, storage: RowBlocks
) -> None:
    nearest = RoundToNearest().quantize(matrix, SYMMETRIC)
    errors = [output_error(values(nearest, SYMMETRIC), matrix, tokens)]
    for quantizer in (ActivationAware(), Gptq()):
        found = quantizer.with_inputs(inputs_of(tokens)).quantize(matrix, storage)
        errors.append(output_error(values(found, storage), matrix, tokens))
    assert errors[0] > 1.1 * errors[1] > 1.2 * errors[2]


def test_channel_scales_lose_less_still(matrix: np.ndarray, tokens: np.ndarray) -> None:
    squares = inputs_of(tokens).squares
    scales = scales_of(channel_exponents(matrix, squares, ASYMMETRIC, 1))
    plain = ActivationAware().with_inputs(Inputs(squares)).quantize(matrix, ASYMMETRIC)
    scaled = ActivationAware().with_inputs(Inputs(squares).scaled(scales))
    found = values(scaled.quantize(matrix * scales, ASYMMETRIC), ASYMMETRIC)[:, :COLUMNS] / scales
    assert output_error(found, matrix, tokens) < 0.95 * output_error(
        values(plain, ASYMMETRIC), matrix, tokens
    )


def test_shared_channels_have_one_scale(matrix: np.ndarray, tokens: np.ndarray) -> None:
    """Four query heads of 12 channels in two groups: the values have two heads."""
    rows, squares = matrix[:, :48], inputs_of(tokens).squares[:48]
    exponents = channel_exponents(rows, squares, RowBlocks(4, 16, zero_points=True), 2, 2)
    assert exponents.shape == (24,) and np.unique(exponents).size > 4


def test_the_search_finds_what_trying_everything_finds() -> None:
    """Every scale of a fine grid and every zero point, for single blocks of 16."""
    random = np.random.default_rng(3)
    storage = RowBlocks(4, 16, zero_points=True)
    rows = random.standard_t(4, (12, 16)).astype(np.float32)
    weights = np.exp(random.normal(0, 1, 16)).astype(np.float32)
    found = ActivationAware().with_inputs(Inputs(weights)).quantize(rows, storage)
    losses = ((values(found, storage) - rows) ** 2 @ weights).astype(float)
    for row, loss in zip(rows.astype(float), losses, strict=True):
        width = row.max() - row.min()
        scales = width / 15 * np.linspace(0.5, 1.2, 281)[:, None, None]
        zeros = np.arange(16.0)[None, :, None]
        codes = np.clip(np.rint(row / scales + zeros), 0, 15)
        best = (((codes - zeros) * scales - row) ** 2 @ weights).min()
        assert best <= loss * 1.001, "trying everything found less than the search"
        assert loss <= 1.5 * best
    assert losses.sum() > 0


@given(
    rows=hnp.arrays(np.float32, (3, 40), elements=st.floats(-8, 8, width=32)),
    squares=hnp.arrays(np.float32, 40, elements=st.floats(0, 100, width=32)),
    zero_points=st.booleans(),
    bits=st.sampled_from([2, 4, 8]),
)
@settings(max_examples=150, deadline=None)
def test_every_weight_gets_the_nearest_code_whatever_the_values(
    rows: np.ndarray, squares: np.ndarray, zero_points: bool, bits: int
) -> None:
    storage = RowBlocks(bits, 16, zero_points=zero_points)
    found = ActivationAware().with_inputs(Inputs(squares)).quantize(rows, storage)
    assert np.isfinite(found.scales).all() and (found.codes < 1 << bits).all()
    scales = np.repeat(found.scales, 16, axis=1)[:, :40].astype(float)
    zeros = found.zero_points
    points = np.full(scales.shape, 1 << (bits - 1)) if zeros is None else np.repeat(zeros, 16, 1)
    points = points[:, :40].astype(float)
    ends = np.sort([-points * scales, ((1 << bits) - 1 - points) * scales], axis=0)
    distance = np.abs(values(found, storage)[:, :40] - np.clip(rows, *ends))
    assert (distance <= 0.501 * np.abs(scales) + 1e-30).all()


@pytest.mark.parametrize("quantizer", [ActivationAware(), Gptq()])
@pytest.mark.parametrize("columns", [40, 64])
def test_rows_do_not_depend_on_one_another(quantizer: CalibratedQuantizer, columns: int) -> None:
    random = np.random.default_rng(5)
    rows = random.standard_normal((20, columns)).astype(np.float32)
    inputs = inputs_of(random.standard_normal((256, columns)).astype(np.float32))
    bound = quantizer.with_inputs(inputs)
    whole = bound.quantize(rows, ASYMMETRIC)
    half = bound.quantize(rows[:10], ASYMMETRIC)
    assert (whole.codes[:10] == half.codes).mean() > 0.995  # products may be added in another order
    np.testing.assert_array_equal(whole.scales[:10], half.scales)


def test_gptq_without_correlations_rounds_to_nearest(matrix: np.ndarray) -> None:
    squares = np.exp(np.random.default_rng(7).normal(0, 1, COLUMNS)).astype(np.float32)
    diagonal = Inputs(squares, np.diag(squares))
    found = Gptq(damping=0).with_inputs(diagonal).quantize(matrix, ASYMMETRIC)
    nearest = ActivationAware().with_inputs(Inputs(squares)).quantize(matrix, ASYMMETRIC)
    np.testing.assert_array_equal(found.codes, nearest.codes)


def test_a_channel_that_is_never_used_does_no_harm(matrix: np.ndarray, tokens: np.ndarray) -> None:
    dead = tokens.copy()
    dead[:, [0, 50]] = 0
    for quantizer in (ActivationAware(), Gptq()):
        found = quantizer.with_inputs(inputs_of(dead)).quantize(matrix, ASYMMETRIC)
        assert output_error(values(found, ASYMMETRIC), matrix, dead) < 0.12


@given(st.floats(2**-15, 2**15))
def test_exponents_are_the_nearest_powers(scale: float) -> None:
    (found,) = scales_of(exponents_of(np.array([scale], np.float32)))
    assert abs(np.log2(found / np.float32(scale))) <= 1 / 16 + 1e-6
