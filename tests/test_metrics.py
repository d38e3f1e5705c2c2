from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llama_onnx.exporter.parity import metrics
from llama_onnx.exporter.parity.thresholds import Threshold, check, thresholds

Pair = tuple[np.ndarray, np.ndarray]

LOGITS = st.floats(-60, 60, width=32)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    shape = draw(SHAPES)
    arrays = hnp.arrays(np.float32, shape, elements=LOGITS)
    # A relative error needs a size to relate to: no logits that are all zero.
    return draw(arrays.filter(np.any)), draw(arrays)


@given(pairs())
def test_kl_is_never_negative(pair: Pair) -> None:
    assert (metrics.kl_divergence(*pair) >= -1e-12).all()


@given(pairs(), st.floats(-1e4, 1e4))
def test_kl_does_not_see_a_shift_of_all_logits(pair: Pair, shift: float) -> None:
    reference, candidate = (x.astype(np.float64) for x in pair)
    expected = metrics.kl_divergence(reference, candidate)
    np.testing.assert_allclose(
        metrics.kl_divergence(reference + shift, candidate), expected, rtol=1e-9, atol=1e-9
    )


@given(pairs())
def test_log_softmax_is_a_distribution(pair: Pair) -> None:
    np.testing.assert_allclose(np.exp(metrics.log_softmax(pair[0])).sum(axis=-1), 1, rtol=1e-12)


@given(pairs())
def test_equal_logits_compare_as_equal(pair: Pair) -> None:
    logits = [pair[0]]
    targets = [np.zeros(len(logits[0]), np.int64)]
    result = metrics.compare(logits, logits, targets)
    assert (result.max_abs, result.mean_abs, result.relative_l2) == (0, 0, 0)
    assert (result.mean_kl, result.p99_kl, result.max_kl) == (0, 0, 0)
    assert result.same_top1 == 1
    assert result.perplexity_ratio == 1


@given(pairs())
def test_the_largest_difference_bounds_the_mean(pair: Pair) -> None:
    result = metrics.compare([pair[0]], [pair[1]])
    assert result.mean_abs <= result.max_abs * (1 + 1e-12)
    assert result.mean_kl <= result.max_kl + 1e-12
    assert result.p99_kl <= result.max_kl + 1e-12


@settings(max_examples=20)
@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pieces_and_sequences_do_not_change_the_figures(
    length: int, sequences: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    reference = [rng.standard_normal((length, 7)).astype(np.float32) for _ in range(sequences)]
    candidate = [r + 0.1 * rng.standard_normal(r.shape).astype(np.float32) for r in reference]
    result = metrics.compare(reference, candidate)
    r, c = np.concatenate(reference), np.concatenate(candidate)
    assert result.positions == length * sequences
    assert result.max_abs == np.abs(c.astype(np.float64) - r).max()
    assert result.relative_l2 == pytest.approx(metrics.relative_l2(r, c), rel=1e-12)
    assert result.mean_kl == pytest.approx(metrics.kl_divergence(r, c).mean(), rel=1e-9)


def test_figures_against_values_worked_out_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    candidate = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    result = metrics.compare([reference], [candidate], [np.array([0, 1])])
    assert result.max_kl == pytest.approx(0.25 * np.log(2))
    assert result.mean_kl == pytest.approx(0.125 * np.log(2))
    assert result.max_abs == pytest.approx(np.log(2))
    assert result.same_top1 == 0.5
    assert result.perplexity_ratio == pytest.approx(np.sqrt(2))  # exp of the mean of ln 2 and 0


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert metrics.kl_divergence(logits, logits)[0] == 0
    assert metrics.kl_divergence(logits, -logits)[0] == pytest.approx(2e4)


def test_positions_without_a_target_do_not_enter_the_perplexity() -> None:
    rng = np.random.default_rng(0)
    reference, candidate = rng.standard_normal((2, 4, 5))
    some = metrics.compare([reference], [candidate], [np.array([2, 1, -1, -1])])
    first = metrics.compare([reference[:2]], [candidate[:2]], [np.array([2, 1])])
    assert some.perplexity_ratio == first.perplexity_ratio
    assert metrics.compare([reference], [candidate]).perplexity_ratio is None


def test_a_pruned_head_is_compared_at_the_last_position() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((4, 5))
    assert metrics.compare([reference], [reference[-1:]]).max_abs == 0
    assert metrics.compare([reference], [reference[:1]]).max_abs > 0


def test_first_divergence_names_step_and_margin() -> None:
    reference = np.array([[3.0, 1, 2], [0, 1, 5], [0, 4, 3.5]])
    assert metrics.first_divergence(reference, [0, 2, 1]) is None
    found = metrics.first_divergence(reference, [0, 2, 2])
    assert found == metrics.Divergence(step=2, chosen=2, expected=1, margin=0.5)
    assert metrics.first_divergence(reference, [1, 2, 1]) == metrics.Divergence(0, 1, 0, 2.0)


def test_nan_passes_no_limit() -> None:
    bad = np.array([[1.0, np.nan]])
    result = metrics.compare([np.ones((1, 2))], [bad])
    rows = (Threshold("every", "graph", "max_abs", 1e9, ""),)
    assert not check(rows, {("graph", "max_abs"): result.max_abs})[0].passed


def test_a_limit_is_inclusive() -> None:
    rows = (Threshold("fp32", "greedy_strict", "divergences", 0, ""),)
    assert check(rows, {("greedy_strict", "divergences"): 0})[0].passed
    assert not check(rows, {("greedy_strict", "divergences"): 1})[0].passed


def test_thresholds_are_the_promised_ones() -> None:
    def limits(precision: str, max_kl: float | None = None) -> dict[str, float]:
        return {f"{t.measure} {t.metric}": t.limit for t in thresholds(precision, max_kl)}

    for precision in ("fp32", "fp16", "int8", "int4"):
        for kind in ("prefill", "decode"):
            assert limits(precision)[f"graph_{kind} max_abs"] == 1e-3
            assert limits(precision)[f"graph_{kind} relative_l2"] == 1e-5
    assert limits("fp32")["quantization mean_kl"] == 1e-6
    assert limits("fp32")["greedy_strict divergences"] == 0
    assert "quantization mean_kl" not in limits("int4")
    assert limits("int4", 0.5)["quantization mean_kl"] == 0.5
    assert json.dumps(limits("int4", 0.5))
