"""Query and key rows interleaved for the rotary embedding, as in Meta's and GGUF's files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound="np.generic[Any]")


def half_split_rows(
    rows: Callable[[int, int], npt.NDArray[Scalar]], head_dim: int, start: int, stop: int
) -> npt.NDArray[Scalar]:
    """Return rows [start, stop) in Hugging Face's order, which pairs rows half a head apart.

    `rows(start, stop)` returns interleaved rows [stop - start, K], where pairs are adjacent: of
    values, or of the bytes of their codes. Whole heads are read and reordered; the result is then
    cut to the rows asked for.
    """
    first, last = start // head_dim, -(-stop // head_dim)
    stored = rows(first * head_dim, last * head_dim)
    width = stored.shape[1]
    pairs = stored.reshape(last - first, head_dim // 2, 2, width)
    halves = pairs.swapaxes(1, 2).reshape(stored.shape)
    return np.ascontiguousarray(halves[start - first * head_dim : stop - first * head_dim])
