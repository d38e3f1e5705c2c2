"""The table of grades and limits, and the words that follow from a loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch

from llama_onnx.exporter.quantize.registry import QUANTIZERS
from llama_onnx.runtime.measure.fidelity import (
    METRICS,
    Fidelity,
    Loss,
    grade_of,
    grades,
    limits_of,
    recipe_of,
    recipes,
    table,
)
from llama_onnx.runtime.measure.metrics import NO_TARGET, compare, nats_of_next
from llama_onnx.runtime.measure.thresholds import Threshold, all_thresholds, thresholds

LARGE = 8_000_000_000

PUBLISHED = {
    "Llama 2 7B Q4_K_M": ((0.012686, 1 - 0.94665, 1.014242), "very close"),
    "Llama 2 7B Q8_0": ((0.000369, 1 - 0.98846, 1.000689), "indistinguishable"),
    "Llama 3 8B Q6_K": ((0.005452, 1 - 0.96031, 1.003490), "indistinguishable"),
    "Llama 3 8B Q4_K_M": ((0.031273, 1 - 0.91901, 1.028160), "very close"),
    "Llama 3 8B Q2_K": ((0.445132, 1 - 0.71138, 1.564849), "another model"),
    "Llama 2 7B Q2_K": ((0.108903, 1 - 0.85584, 1.107955), "close"),
    "135M Q8_0": ((0.008, 1 - 0.946, 1.0005), "indistinguishable"),
    "135M Q4_K_M": ((0.100, 1 - 0.826, 1.085), "close"),
    "135M Q4_0": ((0.535, 1 - 0.630, 1.533), "another model"),
    "135M builder k_quant": ((0.486, 1 - 0.621, 1.457), "another model"),
}
"""llama.cpp's figures (tools/perplexity/README.md), and ours for a model of 135M."""


def loss(mean_kl: float = 0.0, other_top1: float = 0.0, perplexity_ratio: float = 1.0) -> Loss:
    return Loss(1000, mean_kl, 0.001, other_top1, 0.01, perplexity_ratio, 0.01, mean_kl)


def fidelity(lost: Loss, recipe: str = "default", parameters: int = 135_000_000) -> Fidelity:
    return Fidelity(recipe, parameters, "built-in", 20.0, 49152, lost, lost)


@pytest.mark.parametrize(("figures", "word"), PUBLISHED.values(), ids=PUBLISHED)
def test_known_quantizations_get_the_word_they_deserve(
    figures: tuple[float, float, float], word: str
) -> None:
    assert grade_of(loss(*figures)).name == word


@pytest.mark.parametrize(
    "worse", [loss(0.13), loss(other_top1=0.21), loss(perplexity_ratio=1.13)], ids=METRICS
)
def test_each_figure_alone_can_lower_the_grade(worse: Loss) -> None:
    assert grade_of(loss()).name == "indistinguishable"
    assert grade_of(worse).name == "noticeably different"


@pytest.mark.parametrize("metric", METRICS)
def test_a_figure_that_is_not_a_number_is_the_worst(metric: str) -> None:
    changes: dict[str, Any] = {metric: math.nan}
    broken = replace(loss(), **changes)
    assert grade_of(broken).name == "another model"
    assert [limit.metric for limit in fidelity(broken).missed] == [metric]


def test_grades_get_worse_and_only_the_last_has_no_limit() -> None:
    for better, worse in pairwise(grades()):
        assert all(getattr(better, metric) < getattr(worse, metric) for metric in METRICS)
    assert [math.isinf(row.mean_kl) for row in grades()] == [False] * (len(grades()) - 1) + [True]


def test_every_recipe_has_limits_for_small_and_large_models_with_basis_and_reason() -> None:
    named = {
        "int4 rtn",
        "small",
        "fast",
        "default",
        "best",
        "careful",
        "int8",
        "fp16",
        "bf16",
        "fp32",
    }
    assert recipes() == named
    for name in named:
        small, large = limits_of(name, 135_000_000), limits_of(name, LARGE)
        assert small and large
        assert (small.basis, large.basis) == ("measured", "published")
        assert all(getattr(large, metric) <= getattr(small, metric) for metric in METRICS)
    assert all(len(row.reason) > 20 for row in table())


@pytest.mark.parametrize("parameters", [135_000_000, LARGE])
def test_a_recipe_that_takes_more_space_or_time_may_lose_less(parameters: int) -> None:
    order = ["int4 rtn", "small", "fast", "default", "best", "careful", "int8", "fp16", "fp32"]
    rows = [limits_of(name, parameters) for name in order]
    for one, next_ in pairwise(rows):
        assert one and next_
        assert all(getattr(next_, metric) <= getattr(one, metric) for metric in METRICS)


@pytest.mark.parametrize("name", ["int4 rtn", "small", "fast", "default", "best", "careful"])
def test_no_recipe_may_be_another_model(name: str) -> None:
    row = limits_of(name, 1)
    assert row
    at_most = loss(row.mean_kl, row.other_top1, row.perplexity_ratio)
    assert grade_of(at_most).name != "another model"


@pytest.mark.parametrize(
    ("recipe", "precision", "bits", "name"),
    [
        ({}, "int4", 5.1, "int4 rtn"),
        ({"quantizer": "rtn"}, "int8", 9.1, "int8"),
        ({"quantizer": "rtn"}, "fp16", 16, "fp16"),
        ({"quantizer": "awq"}, "int4", 5.2, "default"),
        ({"quantizer": "gptq"}, "int4", 4.4, "small"),
        ({"quantizer": "awq"}, "int4", 8.0, "default"),
        ({"quantizer": "best"}, "int4", 5.2, "best"),
        ({"quantizer": "best"}, "int4", 6.2, "careful"),
        ({"quantizer": "best", "preset": "small"}, "int4", 5.2, "best"),
        ({"quantizer": "best", "chosen": [{"bits": 4, "block_size": 128}]}, "int4", 5.9, "fast"),
        ({"quantizer": "best", "chosen": [{"bits": 4, "block_size": 128}]}, "int4", 4.4, "small"),
        ({"quantizer": "best", "chosen": [{"bits": 8, "block_size": 128}]}, "int4", 5.9, "careful"),
        ({"quantizer": "best", "chosen": "128"}, "int4", 5.2, "best"),
    ],
)
def test_the_limits_are_those_of_preset_quantizer_and_size(
    recipe: dict[str, Any], precision: str, bits: float, name: str
) -> None:
    assert recipe_of(recipe, precision, bits) == name


# Random weights, and what the user asks for


def test_a_model_that_learned_nothing_is_graded_but_has_no_limit() -> None:
    spoiled = loss(2.0, 0.9, 7.0)
    for perplexity, trained in ((20.0, True), (16_000.0, True), (17_000.0, False), (9e9, False)):
        found = replace(fidelity(spoiled), original_perplexity=perplexity)
        assert (found.trained, found.passed, found.allowed) == (trained, not trained, not trained)
        assert found.grade == "another model"  # 49152 ** 0.9 = 16,680


def test_a_loss_can_be_accepted_but_not_one_that_was_excluded() -> None:
    found = fidelity(loss(0.3))
    assert not found.passed and not found.allowed
    accepted = replace(found, accepted=True)
    assert not accepted.passed and accepted.allowed
    excluded = replace(accepted, max_kl=0.25)
    assert not excluded.allowed
    # It is a limit where the recipe's hold, and where the weights are random.
    assert not replace(fidelity(loss(0.1)), max_kl=0.05).allowed
    assert not replace(fidelity(loss(0.1)), max_kl=0.05, original_perplexity=1e9).allowed


# JSON


def test_json_has_everything_and_is_read_again() -> None:
    found = replace(fidelity(loss(0.3, 0.1, 1.1)), max_kl=0.5, accepted=True)
    content = json.loads(json.dumps(found.to_json()))
    assert (content["grade"], content["passed"], content["trained"]) == (
        "another model",
        False,
        True,
    )
    assert [limit["passed"] for limit in content["limits"]] == [False, True, True, True]
    assert Fidelity.from_json(content) == found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recipe", "flawless"),
        ("recipe", ["default"]),
        ("text", "\x1b[32mpassed"),
        ("original_perplexity", "20"),
        ("original_perplexity", math.inf),
        ("parameters", -1),
        ("vocab_size", True),
        ("shipped", {}),
        ("weights", None),
        ("max_kl", "all"),
    ],
)
def test_a_claim_that_nobody_measured_is_refused(key: str, value: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Fidelity.from_json({**fidelity(loss()).to_json(), key: value})


def test_the_words_of_a_claim_are_ours() -> None:
    content = {**fidelity(loss(0.9)).to_json(), "grade": "indistinguishable", "limits": []}
    found = Fidelity.from_json(content)
    assert found.grade == "another model" and not found.passed


# Standard errors, and the perplexity


def test_standard_errors_are_those_of_the_positions() -> None:
    rng = np.random.default_rng(0)
    reference, candidate = rng.standard_normal((2, 40, 30)).astype(np.float32)
    targets = rng.integers(0, 30, 40)
    found = Loss.of(compare([(reference, candidate, targets)]))
    p, q = (torch.from_numpy(x).double().log_softmax(-1) for x in (reference, candidate))
    kl = (p.exp() * (p - q)).sum(-1)
    other = (p.argmax(-1) != q.argmax(-1)).double()
    assert found.mean_kl == pytest.approx(kl.mean().item())
    assert found.mean_kl_error == pytest.approx(stdev(kl.tolist()) / 40**0.5)
    assert found.other_top1 == pytest.approx(other.mean().item())
    assert found.other_top1_error == pytest.approx(stdev(other.tolist()) / 40**0.5)


def test_nats_of_the_next_token_are_pytorchs_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits, targets = (
        rng.standard_normal((1200, 300)).astype(np.float32),
        rng.integers(0, 300, 1200),
    )
    targets[::7] = NO_TARGET
    known = torch.from_numpy(targets != NO_TARGET)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits)[known].double(),
        torch.from_numpy(targets)[known],
        reduction="none",
    )
    np.testing.assert_allclose(nats_of_next(logits, targets), expected.numpy(), rtol=1e-12)


# Limits of conversion by quantizer


def test_limits_on_rounding_to_nearest_are_for_that_quantizer() -> None:
    def measured(quantizer: str) -> set[str]:
        rows = thresholds("int4", "int8", "cpu", quantizer=quantizer)
        return {f"{row.measure} {row.metric}" for row in rows}

    assert measured("rtn") - measured("unheard of") == {"weights steps", "weights block_maximum"}
    assert measured("unheard of") < measured("rtn")


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_quantizer_has_a_limit_on_how_far_it_moves_a_weight(quantizer: str) -> None:
    for activations in ("fp32", "fp16", "bf16", "int8"):
        rows = thresholds("int4", activations, "cpu", quantizer=quantizer)
        assert [row for row in rows if (row.measure, row.metric) == ("weights", "steps")]


def test_rows_of_earlier_certificates_have_no_quantizer_and_hold_for_all() -> None:
    row = all_thresholds()[0].to_json()
    assert row.pop("quantizer") == "rtn"
    assert Threshold.from_row(row).quantizer == "every"
    assert Threshold.from_row(row).applies("int4", "fp32", "cpu", "unheard of")
