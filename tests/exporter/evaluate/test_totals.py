"""Sums that add up exactly, and the intervals computed from them."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.exporter.evaluate.totals import MEANS, ExactSum, Passage, Totals

FLOATS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300)


@given(st.lists(FLOATS, max_size=30), st.randoms())
def test_a_sum_is_exact_in_any_order(values: list[float], shuffler: random.Random) -> None:
    exact = sum(map(Fraction, values), Fraction())
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    half = len(values) // 2
    for found in (
        ExactSum().plus(values),
        ExactSum().plus(shuffled),
        ExactSum().plus(values[half:]).plus(ExactSum().plus(values[:half]).parts),
    ):
        assert sum(map(Fraction, found.parts), Fraction()) == exact
        assert found.value == float(exact)


def passages(count: int, seed: int = 0) -> list[Passage]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(rng.integers(2, 300))
        level = rng.gamma(2.0, 0.01)  # neighbors in a passage are alike
        kl = rng.gamma(2.0, level, length)
        nats = rng.gamma(3.0, 1.0, length - 1)
        change = rng.normal(level, 0.1, length - 1)
        sums = {
            "kl": float(kl.sum()),
            "same_top1": float((rng.random(length) < 0.9).sum()),
            "original_nats": float(nats.sum()),
            "package_nats": float((nats + change).sum()),
            "surprise": float(change.sum()),
        }
        found.append(Passage(length, length - 1, sums, float(kl.max())))
    return found


def test_two_hundred_shards_in_any_order_are_one_pass() -> None:
    every = passages(1000)
    whole = Totals.of(every)
    shards = [Totals.of(every[start : start + 5]) for start in range(0, 1000, 5)]
    assert len(shards) == 200
    for seed in (1, 2):
        random.Random(seed).shuffle(shards)
        merged = Totals()
        for shard in shards:
            merged = merged.plus(Totals.from_json(json.loads(json.dumps(shard.to_json()))))
        assert merged.figures() == whole.figures()


def test_the_figures_are_those_of_numpy() -> None:
    every = passages(400)
    figures = Totals.of(every).figures()
    count = sum(p.positions for p in every)
    predicted = count - len(every)
    assert (figures.positions, figures.passages) == (count, 400)
    assert figures.mean_kl.value == pytest.approx(sum(p.sums["kl"] for p in every) / count, 1e-13)
    nats = sum(p.sums["package_nats"] for p in every) / predicted
    assert figures.perplexity.value == pytest.approx(math.exp(nats), 1e-13)
    assert figures.max_kl == max(p.max_kl for p in every)
    ratio = figures.perplexity.value / figures.original_perplexity.value
    assert figures.perplexity_ratio.value == pytest.approx(ratio, 1e-12)


@pytest.mark.parametrize("name", MEANS)
def test_the_interval_is_that_of_a_bootstrap_over_passages(name: str) -> None:
    every = passages(300, seed=3)
    sums = np.array([p.sums[name] for p in every])
    counts = np.array([p.count(name) for p in every])
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(every), (4000, len(every)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    estimate = Totals.of(every).estimate(name)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * means.std(), rel=0.06)
    assert estimate.low < sums.sum() / counts.sum() < estimate.high


@pytest.mark.slow
def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    truth = Totals.of(passages(20_000, seed=9)).estimate("kl").value
    held = 0
    for seed in range(100, 300):
        estimate = Totals.of(passages(60, seed)).estimate("kl")
        held += estimate.low <= truth <= estimate.high
    assert 175 <= held <= 199  # 95 % of 200 is 190; few passages make it a little less


def test_a_single_passage_has_no_interval() -> None:
    estimate = Totals.of(passages(1)).estimate("kl")
    assert math.isnan(estimate.low) and math.isnan(estimate.high)
    assert estimate.text(".2f") == f"{estimate.value:.2f}"
