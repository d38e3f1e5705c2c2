"""The figures of the quality bench, against scipy-like formulas written out in float64 by torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.quality.figures import compare, log_softmax, measure, standard_error, summarize

TEXTS, LENGTH, VOCABULARY = 3, 150, 2000


@pytest.fixture(scope="module")
def made() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the original's logits, another model's logits: as peaked as a real model's."""
    generator = torch.Generator().manual_seed(0)
    shape = TEXTS, LENGTH, VOCABULARY
    original = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) - 40
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (TEXTS, LENGTH), generator=generator)
    return tokens, original, original + 0.4 * noise + 7


def test_the_figures_are_those_of_torch_in_float64(
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    tokens, original, other = made
    p, q = original.log_softmax(-1), other.log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    loss = torch.nn.functional.cross_entropy
    surprise = [
        torch.stack([loss(x[i, :-1], tokens[i, 1:]) for i in range(TEXTS)])
        for x in (original, other)
    ]
    extra = surprise[1] - surprise[0]

    stored, found = p.numpy().astype(np.float32), other.numpy().astype(np.float32)
    texts = [compare(*one) for one in zip(stored, found, tokens.numpy(), strict=True)]
    figures = summarize(texts)

    means = kl.mean(-1)
    assert figures["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert figures["kl_texts"] == pytest.approx(means.tolist(), rel=1e-5)
    assert figures["kl_error"] == pytest.approx(float(means.std()) / math.sqrt(TEXTS), rel=1e-4)
    assert figures["kl_p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    same = (original.argmax(-1) == other.argmax(-1)).double()
    assert figures["same_top1"] == pytest.approx(float(same.mean()))
    assert 0.2 < figures["same_top1"] < 0.95
    ratio = float(extra.mean().exp())
    assert figures["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
    error = ratio * float(extra.std()) / math.sqrt(TEXTS)
    assert figures["perplexity_ratio_error"] == pytest.approx(error, rel=1e-3)
    assert figures["positions"] == TEXTS * LENGTH


def test_a_model_compared_with_itself_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 70, 500)).astype(np.float32)
    tokens = rng.integers(500, size=(2, 70))
    found = iter(logits)
    figures = measure(log_softmax(logits), tokens, lambda _: next(found))
    assert abs(figures["kl"]) < 1e-6
    assert figures["same_top1"] == 1
    assert figures["perplexity_ratio"] == pytest.approx(1, abs=1e-6)


def test_the_error_of_a_mean_counts_texts_not_tokens() -> None:
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


@pytest.mark.parametrize(("broken", "sentence"), [("shape", "original's"), ("nan", "finite")])
def test_logits_that_cannot_be_compared_are_refused(broken: str, sentence: str) -> None:
    reference = log_softmax(np.zeros((1, 5, 8), np.float32))

    def logits(_: object) -> np.ndarray:
        found = np.zeros((5, 8), np.float32)
        if broken == "nan":
            found[2, 3] = np.nan
        return found if broken == "nan" else found[:, :7]

    with pytest.raises(ValueError, match=sentence):
        measure(reference, np.zeros((1, 5), np.int64), logits)
