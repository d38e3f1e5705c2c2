"""What a quantized model loses, measured on its logits. Needs numpy alone: every peer runs it in
its own environment.

The tokens of one text are correlated, so standard errors come from the means of whole texts: the
standard deviation of these means over the square root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHUNK = 64  # positions at a time: a few arrays as wide as the vocabulary fit a cache


@dataclass(frozen=True)
class TextFigures:
    """Figures of one text of S tokens: KL [S] in nats, whether the likeliest token is the same [S],
    and the surprise [S - 1] about the next token, of the original and of the model."""

    kl: Array
    same: Array
    original: Array
    model: Array


def log_softmax(logits: Array) -> Array:
    """Return log-probabilities in float32, summed in float64; the last axis is the vocabulary."""
    shifted = np.asarray(logits - logits.max(axis=-1, keepdims=True), np.float32)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.asarray(shifted - np.log(total).astype(np.float32))


def compare(reference: Array, logits: Array, tokens: Array) -> TextFigures:
    """Compare the logits [S, V] of a model with the original's log-probabilities [S, V].

    `tokens` [S] are the text's: the logits at a position are about the next of them.
    """
    parts = [
        _chunk(reference[start : start + CHUNK], logits[start : start + CHUNK], next_tokens)
        for start in range(0, len(tokens), CHUNK)
        for next_tokens in [tokens[start + 1 : start + CHUNK + 1]]
    ]
    return TextFigures(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _chunk(reference: Array, logits: Array, following: Array) -> tuple[Array, ...]:
    p, q = np.asarray(reference), log_softmax(logits)
    kl = (np.exp(p) * (p - q)).sum(axis=-1, dtype=np.float64)
    same = p.argmax(axis=-1) == q.argmax(axis=-1)
    known = np.arange(len(following)), following
    return kl, same, -p[known].astype(np.float64), -q[known].astype(np.float64)


def summarize(texts: Sequence[TextFigures]) -> dict[str, Any]:
    """Return the figures of all texts together, with standard errors over texts."""
    kl = [float(text.kl.mean()) for text in texts]
    same = [float(text.same.mean()) for text in texts]
    extra = [float((text.model - text.original).mean()) for text in texts]
    ratio = math.exp(float(np.mean(extra)))
    return {
        "kl": float(np.mean(kl)),
        "kl_error": standard_error(kl),
        "kl_texts": kl,
        "kl_p99": float(np.quantile(np.concatenate([text.kl for text in texts]), 0.99)),
        "same_top1": float(np.mean(same)),
        "same_top1_error": standard_error(same),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * standard_error(extra),
        "positions": sum(len(text.kl) for text in texts),
    }


def standard_error(means: Sequence[float]) -> float:
    """Return the standard error of the mean of `means`, taken as independent."""
    return float(np.std(means, ddof=1) / math.sqrt(len(means)))


def measure(
    reference: Array, tokens: Array, logits: Callable[[Sequence[int]], Array]
) -> dict[str, Any]:
    """Return the figures of a model whose `logits` returns [S, V] for the ids of one text."""
    texts = []
    for known, ids in zip(reference, tokens, strict=True):
        found = logits([int(token) for token in ids])
        if found.shape != known.shape:
            raise ValueError(f"the logits are {found.shape}, but the original's {known.shape}.")
        if not np.isfinite(found).all():
            raise ValueError("the logits are not all finite.")
        texts.append(compare(known, found, ids))
    return summarize(texts)
