"""How a token is chosen: every processor against transformers' own, the draw against chance."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerationMixin

from llama_onnx.runtime.engine.failures import require_finite
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.processors import min_p, top_k, top_p
from llama_onnx.runtime.engine.sampling.sampler import Sampler, candidates
from llama_onnx.targets.errors import PackageError

INF, NAN = float("inf"), float("nan")
LARGEST = float(np.finfo(np.float32).max)
PLAIN: Any = Choice(temperature=1.0)

TIED = st.integers(-8, 8).map(lambda n: n / 4)
VALUE = TIED | st.floats(-60, 60, width=32) | st.sampled_from([-INF, -LARGEST, 1e-40, 0.0, -0.0])


@st.composite
def some_logits(draw: st.DrawFn, most: int = 60) -> np.ndarray:
    values = draw(st.lists(VALUE, min_size=1, max_size=most))
    values.insert(draw(st.integers(0, len(values))), draw(TIED))  # one at least is a number
    return np.array(values, np.float32)


def by_size(logits: np.ndarray) -> list[int]:
    """Ids from the largest logit to the smallest, the lowest first where two are equal."""
    return sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))


def of_transformers(processor: LogitsProcessor, logits: np.ndarray, text: Any = ()) -> np.ndarray:
    ids = torch.tensor([list(text)], dtype=torch.long)
    result: np.ndarray = processor(ids, torch.tensor(logits[None].copy()))[0].numpy()
    return result


def kept_by(processor: LogitsProcessor, logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(of_transformers(processor, logits) > -INF).tolist())


def weights_of(logits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        result: np.ndarray = np.exp(logits - logits.max())
    return result


# Cut-offs


@given(some_logits(), st.integers(1, 70))
@example(np.zeros(5, np.float32), 2)
def test_top_k_keeps_the_largest_and_of_equal_ones_the_lowest_ids(
    logits: np.ndarray, k: int
) -> None:
    kept = top_k(logits, k).tolist()
    assert kept == sorted(by_size(logits)[:k])
    theirs = kept_by(TopKLogitsWarper(k), logits)
    # transformers keeps all that are equal to the last one
    assert {i for i in kept if logits[i] > -INF} <= theirs
    if len(theirs) == min(k, len(logits)):
        assert set(kept) == theirs


@pytest.mark.parametrize("k", [1, 7, 300, 1000])
@pytest.mark.parametrize("levels", [3, 1000, 10**9])
def test_top_k_of_a_large_vocabulary(k: int, levels: int) -> None:
    logits = np.random.default_rng(k).integers(0, levels, 20_011).astype(np.float32)
    assert top_k(logits, k).tolist() == sorted(by_size(logits)[:k])


def fewest(logits: np.ndarray, p: float) -> tuple[list[int], float]:
    """The ids that hold the share `p`, by the definition; how far `p` is from any sum of shares."""
    order = by_size(logits)
    shares = np.exp(logits[order].astype(np.float64) - float(logits.max()))
    sums = np.cumsum(shares) / shares.sum()
    count = 1 + int(np.count_nonzero(sums[:-1] < p))
    return sorted(order[:count]), float(np.abs(sums - p).min())


@given(some_logits(), st.floats(0, 1, exclude_max=True))
@example(np.zeros(2, np.float32), 0.5)
@example(np.zeros(4, np.float32), 0.0)
@example(np.zeros(8, np.float32), 0.25)
@example(np.array([0, -INF], np.float32), 0.999)
def test_top_p_keeps_the_fewest(logits: np.ndarray, p: float) -> None:
    expected, margin = fewest(logits, p)
    exact = len(set(logits.tolist())) == 1 and (p * 8).is_integer() and len(logits) in (2, 4, 8)
    assume(margin > 1e-6 or p == 0 or exact)
    kept = top_p(logits, weights_of(logits), p).tolist()
    assert kept == expected
    theirs = kept_by(TopPLogitsWarper(p), logits.astype(np.float64))
    assert sorted(logits[kept]) == sorted(logits[list(theirs)])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 0.3, 1, 10])
@pytest.mark.parametrize("rounded", [True, False])
def test_top_p_of_a_large_vocabulary(p: float, scale: float, rounded: bool) -> None:
    values = np.random.default_rng(5).standard_normal(20_011) * scale
    logits = (np.round(values, 1) if rounded else values).astype(np.float32)
    expected, _ = fewest(logits, p)
    kept = top_p(logits, weights_of(logits), p)
    # The sums of 20,011 float32 weights are off by 1e-7 or so: some tokens more or fewer.
    assert abs(len(kept) - len(expected)) <= 2e-7 * 20_011 * len(expected) + 1
    assert kept.tolist() == sorted(by_size(logits)[: len(kept)])


@given(some_logits(), st.floats(0, 1))
@example(np.zeros(3, np.float32), 1.0)
def test_min_p_keeps_what_is_likely_enough(logits: np.ndarray, p: float) -> None:
    shares = np.exp(logits.astype(np.float64) - float(logits.max()))
    assume(not np.any(np.isclose(shares[shares < 1], p, rtol=1e-5, atol=0)))
    assume(p == 0 or p > 1e-30)  # below, float32 has few digits, then none
    kept = np.flatnonzero(min_p(weights_of(logits), p) & (logits > -INF))
    assert set(kept.tolist()) == kept_by(MinPLogitsWarper(p), logits.astype(np.float64))


@given(some_logits(), st.floats(0.01, 100))
def test_temperature(logits: np.ndarray, temperature: float) -> None:
    ids, weights = candidates(logits, Choice(temperature=temperature))
    assert list(ids) == list(range(len(logits)))
    scores = of_transformers(TemperatureLogitsWarper(temperature), logits.astype(np.float64))
    expected = torch.softmax(torch.tensor(scores), 0).numpy()
    np.testing.assert_allclose(weights / weights.sum(), expected, rtol=2e-4, atol=1e-30)


# Penalties


def processed(choice: Choice, prompt: list[int], answer: list[int], logits: np.ndarray) -> Any:
    """The logits as they are when a token is chosen, after `answer`."""
    sampler = Sampler(choice, prompt, len(logits))
    for token in answer:
        sampler._remember(token)
    return sampler._processed(logits)


@st.composite
def texts(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[int]]:
    logits = draw(some_logits(most=12))
    token = st.integers(0, len(logits) - 1)
    return logits, draw(st.lists(token, max_size=20)), draw(st.lists(token, max_size=20))


@given(texts(), st.floats(0.01, 100))
def test_repetition_penalty(text: Any, penalty: float) -> None:
    logits, prompt, answer = text
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    expected = of_transformers(theirs, logits.astype(np.float64), prompt + answer)
    found = processed(Choice(repetition_penalty=penalty), prompt, answer, logits)
    np.testing.assert_allclose(found, clipped(expected), rtol=1e-6, atol=1e-44)


def clipped(scores: np.ndarray) -> np.ndarray:
    """In float32's range, but for -inf."""
    return np.where(scores == -INF, scores, np.clip(scores, -LARGEST, LARGEST))


@given(texts(), st.integers(1, 4))
def test_no_ngram_is_repeated(text: Any, size: int) -> None:
    logits, prompt, answer = text
    expected = of_transformers(NoRepeatNGramLogitsProcessor(size), logits, prompt + answer)
    if expected.max() == -INF:  # nothing would be left, and softmax fail
        expected = logits
    found = processed(Choice(no_repeat_ngram_size=size), prompt, answer, logits)
    np.testing.assert_array_equal(found, expected)


@given(texts(), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_penalty(text: Any, presence: float, frequency: float) -> None:
    """As OpenAI documents them: mu[j] -= c[j] * frequency + (c[j] > 0) * presence."""
    logits, prompt, answer = text
    counts = Counter(answer)  # of the answer alone
    expected = clipped(
        np.array(
            [mu - counts[j] * frequency - (counts[j] > 0) * presence for j, mu in enumerate(logits)]
        )
    )
    choice = Choice(presence_penalty=presence, frequency_penalty=frequency)
    found = processed(choice, prompt, answer, logits)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@given(texts(), st.dictionaries(st.integers(0, 1), st.floats(-100, 100), max_size=2))
def test_logit_bias(text: Any, biases: dict[int, float]) -> None:
    logits, prompt, answer = text
    expected = logits.astype(np.float64)
    if biases:
        sequences: Any = {(token,): bias for token, bias in biases.items()}
        theirs = SequenceBiasLogitsProcessor(sequences)
        expected = of_transformers(theirs, logits, [*prompt, *answer, 0])
    choice = Choice(logit_bias=tuple(biases.items()))
    found = processed(choice, prompt, answer, logits)
    np.testing.assert_allclose(found, clipped(expected), rtol=1e-5, atol=1e-5)


# All of them, in transformers' own order


class OfTransformers(GenerationMixin):
    config = SimpleNamespace(is_encoder_decoder=False)


def their_probabilities(choice: Choice, text: list[int], logits: np.ndarray) -> np.ndarray:
    options: dict[str, Any] = {
        name: getattr(choice, name)
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "no_repeat_ngram_size",
        )
    }
    if choice.logit_bias:
        options["sequence_bias"] = {(token,): bias for token, bias in choice.logit_bias}
    untyped: Any = GenerationConfig
    config = untyped(do_sample=True, **options)
    model: Any = OfTransformers()
    chain: Any = model._get_logits_processor(config, input_ids_seq_length=len(text))
    scores = chain(torch.tensor([text]), torch.tensor(logits.astype(np.float64)[None]))
    result: np.ndarray = torch.softmax(scores[0], 0).numpy()
    return result


@given(
    st.integers(0, 2**32 - 1),
    st.builds(
        Choice,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 1, 5, 20, 1000]),
        top_p=st.sampled_from([0.1, 0.6, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 0.5]),
        repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
        no_repeat_ngram_size=st.sampled_from([0, 2, 3]),
        logit_bias=st.sampled_from([(), ((3, 5.0), (7, -100.0))]),
    ),
)
def test_the_whole_chain_is_that_of_transformers(seed: int, choice: Choice) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(40) * 3).astype(np.float32)
    text = rng.integers(0, 40, 30).tolist()
    expected = their_probabilities(choice, text, logits)
    scores = processed(choice, text[:20], text[20:], logits)
    ids, weights = candidates(scores, choice)
    found = np.zeros(40)
    found[list(ids)] = weights / weights.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


# The choice


def choices(choice: Choice, logits: np.ndarray, count: int) -> list[int]:
    sampler = Sampler(choice, [0], len(logits))
    return [sampler.choose(logits).token for _ in range(count)]


@given(some_logits())
def test_a_greedy_choice_is_the_largest_and_of_equal_ones_the_first(logits: np.ndarray) -> None:
    assert choices(Choice(), logits, 2) == [by_size(logits)[0]] * 2
    one = Choice(temperature=1.5, top_k=1, seed=3)
    assert choices(one, logits, 2) == [by_size(logits)[0]] * 2


CHI_SQUARE = {19: 43.82, 4: 18.47}
"""Degrees of freedom -> what one in a thousand fair samples exceeds."""


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        (Choice(temperature=1.0, seed=1), 20),
        (Choice(temperature=2.0, seed=2**64 - 1), 20),
        (Choice(temperature=1.0, top_k=5, seed=3), 5),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(choice: Choice, left: int) -> None:
    logits = np.random.default_rng(8).standard_normal(20).astype(np.float32)
    draws = 10_000
    counts = np.bincount(choices(choice, logits, draws), minlength=20)
    expected = draws * their_probabilities(choice, [0], logits)
    assert np.count_nonzero(expected) == left
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    likely = expected > 0
    distance = (np.square(counts - expected)[likely] / expected[likely]).sum()
    assert distance < CHI_SQUARE[left - 1]


@pytest.mark.parametrize("size", [3, 5000])
def test_a_draw_is_the_inverse_of_the_distribution_at_numpys_own_uniform(size: int) -> None:
    """One uniform number a token: which tokens of the draw's order it falls on, in float64."""
    logits = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    shares = np.exp(logits.astype(np.float64))
    sums = np.cumsum(shares) / shares.sum()
    for seed in (0, 7, 2**63 + 5):
        uniform = np.random.Generator(np.random.Philox(key=seed)).random(50)
        expected = [int(np.searchsorted(sums, u, side="right")) for u in uniform]
        assert choices(Choice(temperature=1.0, seed=seed), logits, 50) == expected


@given(some_logits(), st.integers(0, 2**64 - 1), st.floats(1e-6, 1e6))
def test_what_has_no_weight_is_never_drawn(
    logits: np.ndarray, seed: int, temperature: float
) -> None:
    drawn = choices(Choice(temperature=temperature, seed=seed), logits, 3)
    assert all(logits[token] > -INF for token in drawn)


def test_the_same_seed_draws_the_same_whatever_else_is_drawn() -> None:
    rows = np.random.default_rng(2).standard_normal((30, 50)).astype(np.float32)
    choice = Choice(temperature=1.0, top_p=0.9, seed=2**64 - 2)

    def start(seed: int) -> Sampler:
        return Sampler(Choice(temperature=1.0, top_p=0.9, seed=seed), [1, 2], 50)

    alone = Sampler(choice, [1, 2], 50)
    expected = [alone.choose(row).token for row in rows]
    first, others = start(2**64 - 2), [start(seed) for seed in range(4)]
    found = []
    for number, row in enumerate(rows):
        for other in others[: number % 5]:
            other.choose(row)
        found.append(first.choose(row).token)
    assert found == expected
    for seed in (2**64 - 1, 2**63 - 2, 0):  # every bit counts
        another = start(seed)
        assert [another.choose(row).token for row in rows] != expected


# Log probabilities


@given(some_logits(), st.integers(0, 20), st.sampled_from([0.0, 1.0]))
def test_log_probabilities_are_those_of_the_models_own_logits(
    logits: np.ndarray, count: int, temperature: float
) -> None:
    choice = Choice(
        temperature=temperature, logprobs=count, top_k=3, repetition_penalty=2.0, seed=1
    )
    chosen = Sampler(choice, [0], len(logits)).choose(logits)
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).tolist()
    assert chosen.logprobs is not None
    assert chosen.logprobs.logprob == pytest.approx(expected[chosen.token], rel=1e-5, abs=1e-5)
    assert [token for token, _ in chosen.logprobs.top] == by_size(logits)[:count]
    for token, value in chosen.logprobs.top:
        assert value == pytest.approx(expected[token], rel=1e-5, abs=1e-5)


def test_without_logprobs_there_are_none() -> None:
    assert Sampler(Choice(), [0], 2).choose(np.zeros(2, np.float32)).logprobs is None


# Logits that are not numbers


@pytest.mark.parametrize("values", [[0, NAN], [INF, 0], [-INF, -INF], [NAN, INF]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(values: list[float], temperature: float) -> None:
    sampler = Sampler(Choice(temperature=temperature), [0], 2)
    sampler.choose(np.zeros(2, np.float32))
    with pytest.raises(PackageError, match="output is not a number after 1 tokens"):
        sampler.choose(np.array(values, np.float32))
    with pytest.raises(PackageError, match="output is not a number after 1 tokens"):
        require_finite(np.array(values), 1)


def test_logits_of_another_vocabulary_are_a_mistake_of_the_engine() -> None:
    with pytest.raises(ValueError, match="vocabulary of 3"):
        Sampler(Choice(), [0], 3).choose(np.zeros(4, np.float32))


EXTREMES = [LARGEST, -LARGEST, 1e-45, -1e-45, 1e30, -INF, 0.0, -0.0]


@given(
    st.lists(st.sampled_from(EXTREMES), min_size=2, max_size=9),
    st.builds(
        Choice,
        temperature=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
        top_k=st.integers(0, 10),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.sampled_from([1e-6, 1.0, 1e6]),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        no_repeat_ngram_size=st.integers(0, 3),
        logit_bias=st.sampled_from([(), ((0, 100.0), (1, -100.0))]),
        logprobs=st.none() | st.integers(0, 20),
        seed=st.integers(0, 2**64 - 1),
    ),
)
def test_extremes_choose_a_token_without_a_warning(values: list[float], choice: Choice) -> None:
    assume(max(values) > -INF)
    logits = np.array(values, np.float32)
    before = logits.copy()
    sampler = Sampler(choice, [0, 1], len(logits))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            chosen = sampler.choose(logits)
            assert logits[chosen.token] > -INF
            assert chosen.logprobs is None or math.isfinite(chosen.logprobs.logprob)
    np.testing.assert_array_equal(logits, before)
