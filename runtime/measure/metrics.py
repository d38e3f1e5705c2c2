"""Compare a candidate's logits with a reference's: pure functions in float64.

Logits are [S, V] (positions, vocabulary), finite, of any float dtype. Differences are in logits,
divergences in nats, probabilities between 0 and 1. A NaN on either side makes every figure that
uses it NaN, which is never within a limit.

A reference may be complete (`Logits`) or cut down to its likeliest tokens (`TopK`), as in a
certificate. Then top-1, top-5 and next-token figures are still exact, the KL divergence is given as
two bounds, and the figures of logits are those of the tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

NO_TARGET = -1
"""Marks a position that has no next token to predict."""

NEAR_TIE = 2e-3
"""In logits. Two tokens this close may swap ranks even if the graph is within its limit, 1e-3."""

TOP = 5
"""The number of likeliest tokens whose overlap is counted."""

_ROWS, _VALUES = 8, 1 << 18
"""Positions in float64 at a time, and logits where the vocabulary is small: few enough to stay in
the processor's cache."""


@dataclass(frozen=True)
class TopK:
    """The `k` largest logits at each position, largest first, and the log-sum-exp of all.

    `target_logits` are the logits of the true next tokens, NaN where there is no next token.
    """

    ids: npt.NDArray[np.int32]  # [S, k]
    logits: npt.NDArray[np.float32]  # [S, k]
    logsumexp: npt.NDArray[np.float64]  # [S], over the whole vocabulary
    target_logits: npt.NDArray[np.float32]  # [S]

    @classmethod
    def of(cls, logits: Logits, targets: Ids, k: int) -> TopK:
        """Cut `logits` [S, V] down to the `k` largest, or to all where V is smaller."""
        k = min(k, logits.shape[-1])
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
        rows = np.arange(len(logits))
        known = np.where(targets == NO_TARGET, np.nan, logits[rows, np.maximum(targets, 0)])
        return cls(
            ids.astype(np.int32),
            np.take_along_axis(logits, ids, axis=-1).astype(np.float32),
            logsumexp(logits),
            known.astype(np.float32),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> TopK:
        return TopK(*(getattr(self, field.name)[rows] for field in fields(self)))


Reference = Logits | TopK


@dataclass(frozen=True)
class Comparison:
    """A candidate's logits compared with a reference's, over all positions of all sequences.

    `mean_kl`, `p99_kl` and `max_kl` are of KL(reference || candidate); with a reference cut down to
    its likeliest tokens they are lower bounds, and `mean_kl_bound` is an upper bound of the mean.
    `same_top1` is the share of positions where both have the same likeliest token, `top5_overlap`
    the share of the reference's five likeliest tokens that are among the candidate's five.

    The other figures are about the true next token, None where no position has one: `mean_dp`,
    `rms_dp` and the percentiles `p1_dp` and `p99_dp` of the change of its probability (candidate
    minus reference), `perplexity_ratio` (candidate to reference), and `perplexity_ratio_error`, its
    standard error (paired over positions, delta method).

    `mean_kl_error` and `same_top1_error` are standard errors over the positions, None for a single
    one. All three take positions as independent; neighbors are not quite.
    """

    positions: int
    max_abs: float
    mean_abs: float
    relative_l2: float
    mean_kl: float
    mean_kl_bound: float
    p99_kl: float
    max_kl: float
    same_top1: float
    top5_overlap: float
    mean_dp: float | None
    rms_dp: float | None
    p1_dp: float | None
    p99_dp: float | None
    perplexity_ratio: float | None
    perplexity_ratio_error: float | None
    mean_kl_error: float | None
    same_top1_error: float | None


@dataclass(frozen=True)
class Divergence:
    """A greedily chosen token that is not the `expected` one.

    `margin` is the reference's logit of the expected token minus that of the chosen one. A
    reference cut down to its likeliest tokens treats every other token as the last one it kept.
    """

    step: int
    chosen: int
    expected: int
    margin: float


@dataclass(frozen=True)
class PositionFigures:
    """The figures at each position, [S] each, that a `Comparison` sums up.

    `squares` and `reference_squares` are sums over the vocabulary, `mean_abs` is a mean over it.
    `dp` is the change of the next token's probability, `surprise` its negative log-probability for
    the candidate minus that for the reference, in nats; both are valid where the token is `known`.
    """

    max_abs: Floats
    mean_abs: Floats
    squares: Floats
    reference_squares: Floats
    kl: Floats
    kl_bound: Floats
    top1: Floats
    top5: Floats
    known: npt.NDArray[np.bool_]
    dp: Floats
    surprise: Floats


def logsumexp(logits: Logits) -> Floats:
    """Return log(sum(exp(logits))) [S] in float64, shifted by each row's maximum."""
    shift = logits.max(axis=-1).astype(np.float64)
    total = np.exp(logits.astype(np.float64) - shift[..., None]).sum(axis=-1)
    return np.asarray(np.log(total) + shift)


def log_softmax(logits: Logits) -> Floats:
    """Return log-probabilities [S, V] in float64."""
    return np.asarray(logits.astype(np.float64) - logsumexp(logits)[..., None])


def first_divergence(reference: Reference, tokens: Sequence[int]) -> Divergence | None:
    """Return the first of `tokens` that is not the reference's greedy choice, or None.

    `reference` [n, ...] are the reference's logits at the positions where the n tokens were chosen,
    given the same tokens before them (teacher forcing). None therefore proves that the reference
    would have generated the same tokens.
    """
    for step, (token, expected) in enumerate(zip(tokens, likeliest(reference), strict=True)):
        if token != expected:
            return Divergence(
                step, int(token), int(expected), margin(reference[step : step + 1], expected, token)
            )
    return None


def margin(row: Reference, expected: int, chosen: int) -> float:
    """Return by how many logits the position `row` [1, ...] prefers `expected` to `chosen`."""
    return _logit(row, int(expected)) - _logit(row, int(chosen))


def likeliest(reference: Reference) -> Ids:
    """Return the likeliest token [S] at each position."""
    if isinstance(reference, TopK):
        return reference.ids[:, 0].astype(np.int64)
    return np.asarray(reference.argmax(axis=-1), np.int64)


def compare(pairs: Iterable[tuple[Reference, Logits, Ids]]) -> Comparison:
    """Return all figures over several sequences.

    Each of `pairs` is (reference, candidate, true next tokens or `NO_TARGET`), equally long.
    Computes in float64, a few positions at a time.
    """
    return summarize(figures for pair in _joined(pairs) for figures in figures_in_pieces(*pair))


def figures_in_pieces(
    reference: Reference, candidate: Logits, targets: Ids
) -> Iterator[PositionFigures]:
    """Yield `position_figures` of a few positions at a time, since float64 is large."""
    count = _rows(candidate)
    for start in range(0, len(targets), count):
        rows = slice(start, start + count)
        yield position_figures(reference[rows], candidate[rows], targets[rows])


Pair = tuple[Reference, Logits, Ids]


def _joined(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Join neighbors in `pairs` that are shorter than a piece: each decoded token is a pair."""
    short: list[tuple[Logits, Logits, Ids]] = []
    for reference, candidate, targets in pairs:
        if isinstance(reference, TopK) or len(targets) >= _rows(candidate):
            yield from _join(short)
            short = []
            yield reference, candidate, targets
            continue
        short.append((reference, candidate, targets))
        if sum(len(targets) for *_, targets in short) >= _rows(candidate):
            yield from _join(short)
            short = []
    yield from _join(short)


def _join(pairs: Sequence[tuple[Logits, Logits, Ids]]) -> Iterator[Pair]:
    if pairs:
        reference, candidate, targets = (np.concatenate(part) for part in zip(*pairs, strict=True))
        yield reference, candidate, targets


def _rows(logits: Logits) -> int:
    vocab_size: int = logits.shape[-1]
    return max(_ROWS, _VALUES // vocab_size)


def summarize(pieces: Iterable[PositionFigures]) -> Comparison:
    """Return the figures over all positions of all `pieces`."""
    listed = list(pieces)
    all_ = {
        field.name: np.concatenate([getattr(piece, field.name) for piece in listed])
        for field in fields(PositionFigures)
    }
    known = all_["known"]
    dp, surprise = all_["dp"][known], all_["surprise"][known]
    ratio = float(np.exp(surprise.mean())) if len(dp) else None
    return Comparison(
        positions=len(known),
        max_abs=float(all_["max_abs"].max()),
        mean_abs=float(all_["mean_abs"].mean()),
        relative_l2=float(np.sqrt(all_["squares"].sum() / all_["reference_squares"].sum())),
        mean_kl=float(all_["kl"].mean()),
        mean_kl_bound=float(all_["kl_bound"].mean()),
        p99_kl=float(np.quantile(all_["kl"], 0.99)),
        max_kl=float(all_["kl"].max()),
        same_top1=float(all_["top1"].mean()),
        top5_overlap=float(all_["top5"].mean()),
        mean_dp=float(dp.mean()) if len(dp) else None,
        rms_dp=float(np.sqrt(np.square(dp).mean())) if len(dp) else None,
        p1_dp=float(np.quantile(dp, 0.01)) if len(dp) else None,
        p99_dp=float(np.quantile(dp, 0.99)) if len(dp) else None,
        perplexity_ratio=ratio,
        perplexity_ratio_error=_scaled(ratio, _standard_error(surprise)),
        mean_kl_error=_standard_error(all_["kl"]),
        same_top1_error=_standard_error(all_["top1"]),
    )


def nats_of_next(logits: Logits, targets: Ids) -> Floats:
    """Return the negative log-probability of each next token, where there is one: their mean is the
    logarithm of the perplexity. `targets` [S] as in `compare`."""
    found = []
    for start in range(0, len(targets), _rows(logits)):
        rows = slice(start, start + _rows(logits))
        known = np.flatnonzero(targets[rows] != NO_TARGET)
        likely = log_softmax(logits[rows][known])
        found.append(-likely[np.arange(len(known)), targets[rows][known]])
    return np.concatenate(found)


def position_figures(reference: Reference, candidate: Logits, targets: Ids) -> PositionFigures:
    """Return the figures at each position of `candidate` [S, V]; `targets` [S] as in `compare`."""
    q = log_softmax(candidate)
    rows, chosen = np.arange(len(targets)), np.maximum(targets, 0)
    if isinstance(reference, TopK):
        ids = reference.ids.astype(np.int64)
        wide = reference.logits.astype(np.float64)  # [S, k]
        found = np.take_along_axis(candidate, ids, axis=-1)
        kl, bound = _kl_bounds(wide - reference.logsumexp[:, None], q, ids)
        top = ids[:, :TOP]
        p_next = reference.target_logits - reference.logsumexp
    else:
        wide, found = reference.astype(np.float64), candidate  # [S, V]
        p = log_softmax(reference)
        kl = bound = np.asarray((np.exp(p) * (p - q)).sum(axis=-1))
        top = _top(reference)
        p_next = p[rows, chosen]
    q_next = q[rows, chosen]
    difference = np.abs(found - wide)
    return PositionFigures(
        max_abs=difference.max(axis=-1),
        mean_abs=difference.mean(axis=-1),
        squares=np.square(difference).sum(axis=-1),
        reference_squares=np.square(wide).sum(axis=-1),
        kl=kl,
        kl_bound=bound,
        top1=(likeliest(reference) == candidate.argmax(axis=-1)).astype(np.float64),
        top5=_overlap(top, _top(candidate)),
        known=targets != NO_TARGET,
        dp=np.exp(q_next) - np.exp(p_next),
        surprise=p_next - q_next,
    )


def _kl_bounds(p: Floats, q: Floats, ids: Ids) -> tuple[Floats, Floats]:
    """Return a lower and an upper bound [S] of KL(reference || candidate).

    `q` [S, V] are the candidate's log-probabilities; of the reference's only those of the tokens
    `ids`, `p` [S, k], are known. With P and Q the mass of both outside those tokens, the divergence
    there is at least P log(P / Q) (log sum inequality). It is largest if the reference's mass P is
    on the tokens that the candidate finds least likely, none of them likelier than the k-th.
    """
    head = (np.exp(p) * (p - np.take_along_axis(q, ids, axis=-1))).sum(axis=-1)
    if ids.shape == q.shape:
        return head, head
    rest = np.ones(q.shape, bool)
    np.put_along_axis(rest, ids, False, axis=-1)
    q_rest = q[rest].reshape(len(q), -1)  # [S, V - k]
    mass = np.clip(1 - np.exp(p).sum(axis=-1), 1e-15, None)
    low = head + mass * (np.log(mass) - logsumexp(q_rest))
    return low, np.maximum(head + _worst_rest(q_rest, mass, p[:, -1]), low)


def _worst_rest(q: Floats, mass: Floats, largest: Floats) -> Floats:
    """Return the largest sum of p log(p / q) where p <= exp(`largest`) and all p sum to `mass`.

    The function is convex, so it is largest where as few tokens as possible have any mass.
    """
    share = np.exp(largest)[:, None]
    # At most this many tokens share the mass; sorting the whole vocabulary would take long.
    few = min(int(np.ceil((mass / share[:, 0]).max())) + 1, q.shape[-1])
    q = np.sort(np.partition(q, few - 1, axis=-1)[:, :few], axis=-1)  # the least likely first
    taken = np.minimum(share, np.clip(mass[:, None] - share * np.arange(q.shape[-1]), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(taken > 0, taken * (np.log(taken) - q), 0).sum(axis=-1))


def _top(logits: Logits) -> Ids:
    k = min(TOP, logits.shape[-1])
    return np.asarray(np.argpartition(-logits, k - 1, axis=-1)[:, :k])


def _overlap(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> Floats:
    same = reference[:, :, None] == candidate[:, None, :]  # [S, k, k]
    return np.asarray(same.any(axis=-1).mean(axis=-1), np.float64)


def _standard_error(values: Floats) -> float | None:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _scaled(ratio: float | None, error: float | None) -> float | None:
    return None if ratio is None or error is None else ratio * error


def _logit(row: Reference, token: int) -> float:
    if not isinstance(row, TopK):
        return float(row[0, token])
    kept = np.flatnonzero(row.ids[0] == token)
    return float(row.logits[0, kept[0] if len(kept) else -1])
