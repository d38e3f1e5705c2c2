from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llama_onnx.exporter.parity.measure.weights import WeightError
from llama_onnx.runtime.measure import metrics
from llama_onnx.runtime.measure.metrics import NO_TARGET, TopK
from llama_onnx.runtime.measure.thresholds import Threshold, all_thresholds, check, thresholds

Pair = tuple[np.ndarray, np.ndarray]

LOGITS = st.floats(-60, 60, width=32)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    shape = draw(SHAPES)
    arrays = hnp.arrays(np.float32, shape, elements=LOGITS)
    # A relative error needs a size to relate to: no logits that are all zero.
    return draw(arrays.filter(np.any)), draw(arrays)


def figures(
    reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray | None = None
) -> metrics.PositionFigures:
    none = np.full(len(reference), NO_TARGET)
    return metrics.position_figures(reference, candidate, none if targets is None else targets)


def compared(
    reference: np.ndarray, candidate: np.ndarray, targets: np.ndarray | None = None
) -> metrics.Comparison:
    return metrics.summarize([figures(reference, candidate, targets)])


@given(pairs())
def test_kl_is_never_negative(pair: Pair) -> None:
    assert (figures(*pair).kl >= -1e-12).all()


@given(pairs(), st.floats(-1e4, 1e4))
def test_kl_does_not_see_a_shift_of_all_logits(pair: Pair, shift: float) -> None:
    reference, candidate = (x.astype(np.float64) for x in pair)
    expected = figures(reference, candidate).kl
    np.testing.assert_allclose(
        figures(reference + shift, candidate).kl, expected, rtol=1e-9, atol=1e-9
    )


@given(pairs())
def test_log_softmax_is_a_distribution(pair: Pair) -> None:
    np.testing.assert_allclose(np.exp(metrics.log_softmax(pair[0])).sum(axis=-1), 1, rtol=1e-12)


@given(pairs())
def test_equal_logits_compare_as_equal(pair: Pair) -> None:
    result = compared(pair[0], pair[0], np.zeros(len(pair[0]), np.int64))
    assert (result.max_abs, result.mean_abs, result.relative_l2) == (0, 0, 0)
    assert (result.mean_kl, result.p99_kl, result.max_kl) == (0, 0, 0)
    assert result.same_top1 == result.top5_overlap == 1
    assert (result.mean_dp, result.rms_dp, result.p1_dp, result.p99_dp) == (0, 0, 0, 0)
    assert result.perplexity_ratio == 1


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    rows=st.integers(1, 9),
)
def test_how_positions_are_cut_changes_no_figure(seed: int, lengths: list[int], rows: int) -> None:
    rng = np.random.default_rng(seed)
    reference, candidate = rng.standard_normal((2, sum(lengths), 11), np.float32)
    targets = rng.integers(NO_TARGET, 11, sum(lengths))
    cuts = np.cumsum(lengths)[:-1]
    parts = zip(*(np.split(x, cuts) for x in (reference, candidate, targets)), strict=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_ROWS", rows)
        patch.setattr(metrics, "_VALUES", 1)
        assert metrics.compare(parts) == compared(reference, candidate, targets)


@given(pairs())
def test_the_largest_difference_bounds_the_mean(pair: Pair) -> None:
    result = compared(*pair)
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
    targets = [rng.integers(-1, 7, length) for _ in range(sequences)]
    result = metrics.compare(zip(reference, candidate, targets, strict=True))
    r, c = np.concatenate(reference), np.concatenate(candidate)
    assert result.positions == length * sequences
    assert result.max_abs == np.abs(c.astype(np.float64) - r).max()
    distance = np.linalg.norm(c - r.astype(np.float64)) / np.linalg.norm(r)
    assert result.relative_l2 == pytest.approx(distance, rel=1e-6)
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (r, c))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert result.mean_kl == pytest.approx(float(kl), rel=1e-9)


def test_figures_against_values_worked_out_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    candidate = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    result = compared(reference, candidate, np.array([0, 1]))
    assert result.max_kl == pytest.approx(0.25 * np.log(2))
    assert result.mean_kl == result.mean_kl_bound == pytest.approx(0.125 * np.log(2))
    assert result.max_abs == pytest.approx(np.log(2))
    assert result.same_top1 == 0.5
    assert result.mean_dp == pytest.approx(-0.125)  # 0.25 - 0.5, and 0
    assert result.rms_dp == pytest.approx(0.25 / np.sqrt(2))
    assert result.perplexity_ratio == pytest.approx(np.sqrt(2))  # exp of the mean of ln 2 and 0
    # The standard error of two numbers is half their distance.
    assert result.perplexity_ratio_error == pytest.approx(np.sqrt(2) * np.log(2) / 2)


def test_top5_overlap_counts_tokens_whatever_their_order() -> None:
    reference = np.array([[9.0, 8, 7, 6, 5, 4, 3]])
    assert compared(reference, np.array([[5.0, 6, 7, 8, 9, 4, 3]])).top5_overlap == 1
    assert compared(reference, np.array([[1.0, 2, 3, 4, 5, 6, 7]])).top5_overlap == 3 / 5


def test_huge_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert figures(logits, logits).kl[0] == 0
    assert figures(logits, -logits).kl[0] == pytest.approx(2e4)


def test_positions_without_a_target_do_not_enter_the_perplexity() -> None:
    rng = np.random.default_rng(0)
    reference, candidate = rng.standard_normal((2, 4, 5))
    some = compared(reference, candidate, np.array([2, 1, -1, -1]))
    first = compared(reference[:2], candidate[:2], np.array([2, 1]))
    assert some.perplexity_ratio == first.perplexity_ratio
    nothing = compared(reference, candidate)
    assert nothing.perplexity_ratio is None and nothing.mean_dp is None


@given(pairs(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_likeliest_tokens_bound_the_divergence(pair: Pair, k: int, random: Any) -> None:
    reference, candidate = pair
    targets = np.array([random.randrange(-1, reference.shape[1]) for _ in reference])
    kept = TopK.of(reference, targets, k)
    whole, cut = figures(reference, candidate, targets), figures(kept, candidate, targets)  # type: ignore[arg-type]
    # What is kept in float32 leaves the mass of the rest known to 1e-7, times a logarithm.
    assert (cut.kl <= whole.kl + 1e-5).all()
    assert (whole.kl <= cut.kl_bound + 1e-5).all()
    known = targets != NO_TARGET
    np.testing.assert_allclose(cut.dp[known], whole.dp[known], atol=1e-6)
    np.testing.assert_allclose(cut.surprise[known], whole.surprise[known], atol=1e-4)
    assert (cut.max_abs <= whole.max_abs + 1e-6).all()
    if k >= reference.shape[1]:
        np.testing.assert_allclose(cut.kl, whole.kl, atol=1e-5)
        np.testing.assert_allclose(cut.squares, whole.squares, rtol=1e-6)


def test_first_divergence_names_step_and_margin() -> None:
    reference = np.array([[3.0, 1, 2], [0, 1, 5], [0, 4, 3.5]])
    assert metrics.first_divergence(reference, [0, 2, 1]) is None
    found = metrics.first_divergence(reference, [0, 2, 2])
    assert found == metrics.Divergence(step=2, chosen=2, expected=1, margin=0.5)
    assert metrics.first_divergence(reference, [1, 2, 1]) == metrics.Divergence(0, 1, 0, 2.0)
    kept = TopK.of(reference, np.full(3, NO_TARGET), 2)
    assert metrics.first_divergence(kept, [0, 2, 2]) == found
    # Token 1 is none of the two kept: it is at least as far behind as the last of them.
    assert metrics.first_divergence(kept, [1, 2, 1]) == metrics.Divergence(0, 1, 0, 1.0)


def test_nan_passes_no_limit() -> None:
    bad = np.array([[1.0, np.nan]])
    result = compared(np.ones((1, 2)), bad, np.array([0]))
    assert result.perplexity_ratio is not None and np.isnan(result.perplexity_ratio)
    rows = (Threshold("every", "every", "every", "graph", "max_abs", 1e9, ""),)
    assert not check(rows, {("graph", "prefill", "max_abs"): result.max_abs})[0].passed


def test_a_limit_is_inclusive_and_holds_in_every_situation() -> None:
    rows = (Threshold("fp32", "every", "every", "graph", "max_abs", 1, ""),)
    values = {("graph", "prefill", "max_abs"): 1.0, ("graph", "decode", "max_abs"): 1.1}
    assert [c.passed for c in check(rows, values)] == [True, False]


def test_thresholds_are_the_promised_ones() -> None:
    def limits(precision: str, max_kl: float | None = None) -> dict[str, float]:
        activations = "int8" if precision in ("int8", "int4") else "fp32"
        rows = thresholds(precision, activations, "cpu", max_kl)
        return {f"{t.measure} {t.metric}": t.limit for t in rows}

    for precision in ("fp32", "fp16", "int8", "int4"):
        assert limits(precision)["graph max_abs"] == 1e-3
        assert limits(precision)["graph relative_l2"] == 1e-5
    assert limits("fp32")["shipped relative_l2"] == 1e-5
    assert limits("int4")["shipped relative_l2"] == 0.1
    assert limits("fp32")["quantization mean_kl"] == 1e-6
    assert limits("fp32")["greedy divergences"] == 0
    assert "quantization mean_kl" not in limits("int4")
    assert (
        limits("int4", 0.5)["quantization mean_kl"] == limits("int4", 0.5)["total mean_kl"] == 0.5
    )


def test_every_threshold_has_a_reason_and_a_metric_that_is_measured() -> None:
    of_weights = WeightError.__dataclass_fields__
    metrics_ = {*metrics.Comparison.__dataclass_fields__, *of_weights, "divergences"}
    for row in all_thresholds():
        assert len(row.reason) > 10 and row.metric in metrics_
        assert Threshold.from_row(row.to_json()) == row
