"""What changes or removes logits before a token is chosen: one function each, in NumPy.

Each means what the processor of transformers with the same name means. Two differences: among equal
logits the lowest token ids stay, where transformers keeps all (top-k) or whichever its sort puts
last (top-p); and sums are in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]
Weights = npt.NDArray[np.float32]

_LARGEST = float(np.finfo(np.float32).max)
_MARGIN = 0.999
"""Far more than float32 rounds in a sum of weights."""

_BLOCK = 64
"""Logits of which only the largest is looked at first."""

_SORTED, _BINS = 2048, 4096
"""Most values that are sorted at once; bins for more."""

_LEAST_SPREAD = 1e-30
"""Of values that go into bins: their number divided by it is in float32's range."""


def add_bias(logits: Logits, biases: Sequence[tuple[int, float]]) -> None:
    """Add a number to the logits of some tokens, in place."""
    tokens = [token for token, _ in biases]
    added = np.array([bias for _, bias in biases], np.float64)
    logits[tokens] = _in_range(logits[tokens] + added)


def penalize_repetition(logits: Logits, seen: Ids, penalty: float) -> None:
    """Divide positive logits of the tokens `seen` by `penalty`, and multiply others, in place."""
    scores = logits[seen].astype(np.float64)
    logits[seen] = _in_range(np.where(scores < 0, scores * penalty, scores / penalty))


def penalize_presence_and_frequency(
    logits: Logits, counts: Mapping[int, int], presence: float, frequency: float
) -> None:
    """Subtract `presence` once, and `frequency` for each time, from the tokens of an answer.

    `counts` has the tokens that the answer has so far. OpenAI's API defines it so, and vLLM.
    """
    tokens = np.fromiter(counts.keys(), np.intp, len(counts))
    times = np.fromiter(counts.values(), np.float64, len(counts))
    logits[tokens] = _in_range(logits[tokens] - (frequency * times + presence))


def ban(logits: Logits, banned: Sequence[int]) -> None:
    """Remove the tokens `banned` in place, such as those that would repeat a sequence of tokens.

    A ban that would leave nothing is lifted.
    """
    kept = logits[banned]
    logits[banned] = -np.inf
    if logits.max() == -np.inf:
        logits[banned] = kept


def top_k(logits: Logits, k: int) -> Ids:
    """Return the ids of the `k` largest logits, ascending."""
    if k >= len(logits):
        return np.arange(len(logits))
    possible = logits
    # The K largest of the blocks' maxima are K logits: the K largest logits are not below them.
    # To partition them all takes four times as long.
    blocks = len(logits) // _BLOCK
    if blocks > k:
        maxima = logits[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0)
        possible = logits[logits >= _kth(maxima, k)]
    return _largest(logits, _kth(possible, k), k)


def _kth(values: Logits, k: int) -> np.float32:
    """Return the `k`-th largest of at least `k` values."""
    least: np.float32 = np.partition(values, len(values) - k)[len(values) - k]
    return least


def top_p(logits: Logits, weights: Weights, p: float) -> Ids:
    """Return the ids of the fewest largest logits with at least the share `p` of the weights.

    `weights` are the exponentials of the logits, of any scale. At least one id is returned; they
    are in ascending order.
    """
    total = weights.sum(dtype=np.float64)
    # Without a sort of them all: the tokens whose weight is below the average of what may be left
    # out are, all together, less than that.
    possible = np.flatnonzero(weights > _MARGIN * (1 - p) * total / len(weights))
    values = logits[possible]
    least, count = _fewest(values, weights[possible], p * total)
    return possible[_largest(values, least, count)]


def _fewest(values: Logits, weights: Weights, goal: float) -> tuple[np.float32, int]:
    """Return the smallest of the fewest largest values whose weights sum to `goal`, and how many
    they are, at least one."""
    spread = float(values.max()) - float(values.min())
    if len(values) <= _SORTED or spread < _LEAST_SPREAD:
        descending, shares = np.sort(values)[::-1], np.sort(weights)[::-1]
        before = np.cumsum(shares, dtype=np.float64) - shares
        count = max(1, int(np.count_nonzero(before < goal)))
        return descending[count - 1], count
    # To sort them all takes ten times as long as to sort the bin in which the goal is reached.
    bins = ((values.max() - values) * np.float32(_BINS / spread)).astype(np.intp)
    sums = np.bincount(bins, weights)
    above = np.cumsum(sums) - sums
    filled = np.flatnonzero(sums)
    reached = filled[max(0, int(np.count_nonzero(above[filled] < goal)) - 1)]
    inside = bins == reached
    least, count = _fewest(values[inside], weights[inside], goal - float(above[reached]))
    return least, count + int(np.count_nonzero(bins < reached))


def min_p(weights: Weights, p: float) -> npt.NDArray[np.bool_]:
    """Return which weights are at least `p` times the largest."""
    result: npt.NDArray[np.bool_] = weights >= p * weights.max()
    return result


def _largest(logits: Logits, least: np.float32, count: int) -> Ids:
    """Return the ids of the `count` largest logits, of which `least` is the smallest."""
    ids = np.flatnonzero(logits >= least)
    excess = len(ids) - count
    if excess:
        ties = np.flatnonzero(logits[ids] == least)
        ids = np.delete(ids, ties[len(ties) - excess :])
    return ids


def _in_range(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keep sums and quotients in float32's range; -inf, which is a ban, stays."""
    return np.where(np.isneginf(scores), scores, np.clip(scores, -_LARGEST, _LARGEST))
