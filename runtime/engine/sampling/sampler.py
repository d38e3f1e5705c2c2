"""Chooses the tokens of one answer, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.failures import likeliest
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.processors import (
    Ids,
    Logits,
    Weights,
    add_bias,
    ban,
    min_p,
    penalize_presence_and_frequency,
    penalize_repetition,
    top_k,
    top_p,
)


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities by the model's own logits, before penalties, cut-offs and temperature.

    `logprob` is the chosen token's; `top` has the likeliest tokens with theirs, likeliest first,
    the lower id first where two are equal.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chosen:
    """A token, and its log probabilities if the caller wants them."""

    token: int
    logprobs: TokenLogprobs | None


_BLOCK = 1024
"""Tokens that a draw takes together first: sums are faster than cumulative sums."""


class Constraint(Protocol):
    """What the answer's text must be, such as a schema: says which tokens may come next."""

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next [vocabulary]; at least one may."""

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""


class Sampler:
    """Chooses the tokens of one answer, of which it keeps the history and the random numbers.

    So an answer depends on its own logits, `choice` and `prompt` alone, whatever else runs in the
    batch, and however the prompt was split. The processors run in the order of transformers:
    constraint, bias, repetition, presence and frequency, n-grams, temperature, top-k, top-p, min-p.
    """

    def __init__(
        self,
        choice: Choice,
        prompt: Sequence[int],
        vocab_size: int,
        constraint: Constraint | None = None,
    ) -> None:
        """Start an answer to `prompt`, whose tokens are below `vocab_size`."""
        self._choice, self._constraint, self._vocab_size = choice, constraint, vocab_size
        # Philox is a counter and a key: NumPy promises its raw numbers for every version.
        self._random = np.random.Philox(key=choice.seed)
        self._changes = bool(
            choice.logit_bias
            or choice.repetition_penalty != 1
            or choice.presence_penalty
            or choice.frequency_penalty
        )
        self._answer: Counter[int] = Counter()
        self._count = 0
        self._seen = np.zeros(vocab_size, np.bool_)
        self._seen[np.asarray(prompt, np.intp)] = True
        self._ngrams = _NGrams(choice.no_repeat_ngram_size, prompt)

    def choose(self, logits: Logits) -> Chosen:
        """Return the next token for `logits` [vocabulary], which stay as they are.

        Raises `PackageError` if the logits are not numbers.
        """
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits {logits.shape} for a vocabulary of {self._vocab_size}")
        token = likeliest(logits, self._count)
        scores = self._processed(logits)
        if self._choice.temperature == 0:
            token = token if scores is logits else int(scores.argmax())
        else:
            ids, weights = candidates(scores, self._choice)
            token = int(ids[_inverse_cdf(weights, self._uniform())])
        self._remember(token)
        wanted = self._choice.logprobs
        return Chosen(token, None if wanted is None else log_probabilities(logits, token, wanted))

    def _processed(self, logits: Logits) -> Logits:
        """Return the logits after all processors: the same array if none has anything to do."""
        choice, banned = self._choice, self._ngrams.completing()
        if self._constraint is None and not (self._changes or banned):
            return logits
        scores = logits.astype(np.float32)  # a copy
        if self._constraint is not None:
            _allow(scores, self._constraint.mask())
        if choice.logit_bias:
            add_bias(scores, choice.logit_bias)
        if choice.repetition_penalty != 1:
            penalize_repetition(scores, np.flatnonzero(self._seen), choice.repetition_penalty)
        if self._answer and (choice.presence_penalty or choice.frequency_penalty):
            penalize_presence_and_frequency(
                scores, self._answer, choice.presence_penalty, choice.frequency_penalty
            )
        if banned:
            ban(scores, banned)
        return scores

    def _uniform(self) -> float:
        """Return a number from 0 to below 1, with 53 bits."""
        return int(self._random.random_raw() >> 11) * 2.0**-53

    def _remember(self, token: int) -> None:
        self._count += 1
        self._answer[token] += 1
        self._seen[token] = True
        self._ngrams.add(token)
        if self._constraint is not None:
            self._constraint.accept(token)


class _NGrams:
    """The sequences of `size` tokens that a text has; none for size 0."""

    def __init__(self, size: int, prompt: Sequence[int]) -> None:
        self._size = size
        self._last: tuple[int, ...] = ()
        self._after: dict[tuple[int, ...], set[int]] = {}
        if size:
            for token in prompt:
                self.add(int(token))

    def add(self, token: int) -> None:
        """Append a token to the text."""
        if not self._size:
            return
        if len(self._last) == self._size - 1:
            self._after.setdefault(self._last, set()).add(token)
        kept = self._size - 1
        self._last = (*self._last, token)[-kept:] if kept else ()

    def completing(self) -> list[int]:
        """Return the tokens that would complete a sequence which the text has."""
        return sorted(self._after.get(self._last, ())) if self._size else []


def candidates(scores: Logits, choice: Choice) -> tuple[Ids | range, Weights]:
    """Return the ids that can be drawn, ascending, and how often each is, on any scale."""
    ids: Ids | range = range(len(scores))
    if 0 < choice.top_k < len(scores):
        ids = top_k(scores, choice.top_k)
        scores = scores[ids]
    weights = _weights(scores, choice.temperature)
    if choice.top_p < 1:
        kept = top_p(scores, weights, choice.top_p)
        ids, weights = kept if isinstance(ids, range) else ids[kept], weights[kept]
    if choice.min_p > 0:
        weights = np.where(min_p(weights, choice.min_p), weights, 0)
    return ids, weights


def log_probabilities(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Return the log probability of `token`, and of the `count` likeliest tokens."""
    largest = logits.max()
    total = _weights(logits, 1.0).sum(dtype=np.float64)
    least = float(largest) + float(np.log(total))
    top: list[int] = []
    if count:
        ids = top_k(logits, count)
        top = ids[np.argsort(-logits[ids], kind="stable")].tolist()
    return TokenLogprobs(
        float(logits[token]) - least, tuple((i, float(logits[i]) - least) for i in top)
    )


def _allow(scores: Logits, allowed: npt.NDArray[np.bool_]) -> None:
    """Remove all tokens but those `allowed`, in place; where all of those have -inf, equally."""
    scores[~allowed] = -np.inf
    if scores.max() == -np.inf:
        scores[allowed] = 0


def _weights(scores: Logits, temperature: float) -> Weights:
    """Return the probabilities times a factor: the likeliest has the weight 1."""
    with np.errstate(over="ignore"):  # to -inf, which has no weight
        weights: Weights = np.exp((scores - scores.max()) / np.float32(temperature))
    return weights


def _inverse_cdf(weights: Weights, uniform: float) -> int:
    """Return the first place whose cumulative share of the weights is above `uniform`."""
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts, dtype=np.float64)
    block, rest = _first_above(sums, uniform * float(sums.sum()))
    place, _ = _first_above(weights[starts[block] :][:_BLOCK], rest)
    return int(starts[block]) + place


def _first_above(weights: Weights, goal: float) -> tuple[int, float]:
    """Return the first place where the sum of `weights` is above `goal`, and what `goal` is without
    the sum before that place."""
    cumulative = np.cumsum(weights.astype(np.float64))
    place = int(np.searchsorted(cumulative, goal, side="right"))
    # Rounding can put the goal at the total: then the last place that has a weight.
    place = min(place, int(np.searchsorted(cumulative, cumulative[-1], side="left")))
    return place, goal - float(cumulative[place - 1] if place else 0)
