"""How far two sets of logits are apart: pure functions in float64.

Logits are [S, V] (positions, vocabulary), finite float32 or float64. Differences are in logits,
divergences in nats. A NaN on either side makes every figure it enters NaN, and no limit holds then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

NO_TARGET = -1
"""Marks a position without a next token to predict."""

_ROWS = 8  # positions in float64 at a time: few enough to stay in the processor's cache


@dataclass(frozen=True)
class Comparison:
    """A candidate's logits against a reference's, over all positions of all sequences."""

    positions: int
    max_abs: float
    mean_abs: float
    relative_l2: float
    mean_kl: float
    p99_kl: float
    max_kl: float
    same_top1: float
    perplexity_ratio: float | None


@dataclass(frozen=True)
class Divergence:
    """A greedily chosen token that is not the reference's first choice.

    `margin` is the reference's logit of its own choice minus that of the token chosen.
    """

    step: int
    chosen: int
    expected: int
    margin: float


def log_softmax(logits: Logits) -> Floats:
    """Log-probabilities [S, V] in float64, by the usual shift by each row's maximum."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def kl_divergence(reference: Logits, candidate: Logits) -> Floats:
    """KL(reference || candidate) in nats at each position: sum p (log p - log q). Shape [S].

    Never negative but for rounding: -1e-15 may stand for 0.
    """
    return _kl(log_softmax(reference), log_softmax(candidate))


def same_top1(reference: Logits, candidate: Logits) -> npt.NDArray[np.bool_]:
    """Where the two agree on the likeliest token. Shape [S]."""
    return np.asarray(reference.argmax(axis=-1) == candidate.argmax(axis=-1))


def relative_l2(reference: Logits, candidate: Logits) -> float:
    """||candidate - reference|| / ||reference|| over everything."""
    wide = reference.astype(np.float64)
    return float(np.linalg.norm(candidate - wide) / np.linalg.norm(wide))


def first_divergence(reference: Logits, tokens: Sequence[int]) -> Divergence | None:
    """The first of `tokens` that is not the reference's greedy choice, or None.

    `reference` [n, V] are the reference's logits at the positions where the n tokens were chosen,
    given the very same tokens before them (teacher forcing): None proves that the reference, left
    to itself, would have written the same.
    """
    expected = reference.argmax(axis=-1)
    apart = np.flatnonzero(expected != np.asarray(tokens))
    if not len(apart):
        return None
    step = int(apart[0])
    chosen, wanted = int(tokens[step]), int(expected[step])
    margin = float(reference[step, wanted]) - float(reference[step, chosen])
    return Divergence(step, chosen, wanted, margin)


def compare(
    reference: Sequence[Logits],
    candidate: Sequence[Logits],
    targets: Sequence[Ids] | None = None,
) -> Comparison:
    """All figures over several sequences, float64 in bounded pieces.

    Where one side has fewer positions than the other (a head that answers for the last one only),
    the last positions are compared. `targets` [S] are the true next tokens, `NO_TARGET` for none.
    """
    pieces = [
        _figures(r[rows], c[rows], t[rows])
        for r, c, t in _aligned(reference, candidate, targets)
        for rows in _pieces(len(r))
    ]
    size = min(reference[0].shape[-1], candidate[0].shape[-1])
    figures = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    surprise = figures["surprise"]
    return Comparison(
        positions=len(figures["kl"]),
        max_abs=float(figures["max_abs"].max()),
        mean_abs=float(figures["sum_abs"].mean() / size),
        relative_l2=float(np.sqrt(figures["squares"].sum() / figures["reference_squares"].sum())),
        mean_kl=float(figures["kl"].mean()),
        p99_kl=float(np.quantile(figures["kl"], 0.99)),
        max_kl=float(figures["kl"].max()),
        same_top1=float(figures["top1"].mean()),
        perplexity_ratio=float(np.exp(surprise.mean())) if len(surprise) else None,
    )


def _figures(reference: Logits, candidate: Logits, targets: Ids) -> dict[str, Floats]:
    """What the figures of `Comparison` are made of: [S] each, "surprise" (the nats that a true
    next token costs the candidate more than the reference) only where there is a target."""
    wide = reference.astype(np.float64)
    difference = np.abs(candidate - wide)
    p, q = log_softmax(reference), log_softmax(candidate)
    has = np.flatnonzero(targets != NO_TARGET)
    return {
        "max_abs": difference.max(axis=-1),
        "sum_abs": difference.sum(axis=-1),
        "squares": np.square(difference).sum(axis=-1),
        "reference_squares": np.square(wide).sum(axis=-1),
        "kl": _kl(p, q),
        "top1": same_top1(reference, candidate).astype(np.float64),
        "surprise": p[has, targets[has]] - q[has, targets[has]],
    }


def _kl(p: Floats, q: Floats) -> Floats:
    """KL [S] from log-probabilities [S, V]."""
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def _aligned(
    reference: Sequence[Logits], candidate: Sequence[Logits], targets: Sequence[Ids] | None
) -> list[tuple[Logits, Logits, Ids]]:
    if targets is None:
        targets = [np.full(len(r), NO_TARGET) for r in reference]
    triples = []
    for r, c, t in zip(reference, candidate, targets, strict=True):
        length = min(len(r), len(c))
        triples.append((r[-length:], c[-length:], t[-length:]))
    return triples


def _pieces(length: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, length, _ROWS)]
