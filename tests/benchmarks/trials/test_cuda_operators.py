"""The trial of CUDA's operators, on the CPU: its expected values are right, and see a fault."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from benchmarks.trials import cuda_operators as trial

MATRICES = [
    trial.Matrix(64, bits, zeros=zeros, scales=scales)
    for bits, zeros, scales in product((4, 8), ("none", "uint8"), ("fp16", "cast", "packed"))
]
ODD = trial.Matrix(96, zeros="uint8")
"""Three blocks a row: the zero points of a row fill one byte and a half."""


def error(matrix: trial.Matrix, expected: trial.Matrix) -> float:
    """The error of a product of random rows, if the values were those of `expected`."""
    weights, _ = trial.codes(matrix, np.random.default_rng(0))
    _, values = trial.codes(expected, np.random.default_rng(0))
    session = trial.opened(trial.chain(matrix, [weights]), "cpu")
    assert set(trial.where(session)) == {"MatMulNBits"}, "scales are computed at each run"
    x = np.random.default_rng(1).standard_normal((1, 3, matrix.size)).astype(np.float16)
    (y,) = session.run(None, {"x": x})
    return trial.relative(y[0], x[0].astype(np.float64) @ values.T)


@pytest.mark.parametrize("matrix", [*MATRICES, ODD], ids=lambda matrix: matrix.what)
def test_numbers_are_those_of_onnxruntime(matrix: trial.Matrix) -> None:
    assert error(matrix, matrix) < 1e-3


def test_a_wrong_zero_point_is_seen() -> None:
    matrix = trial.Matrix(64, zeros="uint8")
    assert error(matrix, replace(matrix, zeros="none")) > 0.1


@pytest.mark.parametrize(("bits", "zeros"), [*product((4, 8), (False, True))])
def test_rows_of_a_table(bits: int, zeros: bool) -> None:
    found = trial.gather(bits, zeros, "cpu")
    assert found["error"] < 1e-3


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_in_fp16_is_the_reference_itself(shared: bool) -> None:
    found = trial.attention("NONE", shared, "cpu")
    assert found["error, prompt"] == found["error, step"] == 0
