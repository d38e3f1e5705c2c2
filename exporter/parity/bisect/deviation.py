"""How far one value of a graph is from what it has to be, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Deviation:
    """`relative_l2` over everything, `worst` that of the position where it is largest (infinite
    where the reference is zero). `positions` [B, S] are those beyond the limit,
    `channels` [C] those with a value beyond ten times as much of what is usual at its position; a
    value without channels has one."""

    relative_l2: float
    worst: float
    max_abs: float
    positions: npt.NDArray[np.bool_]
    channels: npt.NDArray[np.bool_]

    def within(self, limit: float) -> bool:
        """Whether the whole is within `limit`, and every position within ten times as much; a NaN
        never is."""
        return self.relative_l2 <= limit and self.worst <= 10 * limit


def deviation(expected: Array, found: Array, limit: float) -> Deviation:
    """Compare `found` with `expected` of the same shape; what is NaN there does not count.

    Shapes: [B, S, ...]; with four dimensions [B, heads, S, head_dim].
    """
    wanted, seen = _by_position(expected), _by_position(found)
    counted = ~np.isnan(wanted)
    error = np.where(counted, seen - wanted, 0)  # [B, S, C]
    wanted = np.where(counted, wanted, 0)
    squares, norms = np.square(error).sum(-1), np.square(wanted).sum(-1)  # [B, S]
    each = _ratio(squares, norms)
    # A channel is measured by what is usual in the channels of its position.
    usual = np.sqrt(norms / wanted.shape[-1])[..., None]
    by_channel = _ratio(error**2, usual**2).max((0, 1))
    return Deviation(
        float(_ratio(squares.sum(), norms.sum())),
        float(each.max()),
        float(np.abs(error).max()),
        ~(each <= limit),
        ~(by_channel <= 10 * limit),
    )


def _by_position(value: Array) -> Floats:
    """As [B, S, C]."""
    wide = value.astype(np.float64)
    if wide.ndim == 4:
        wide = wide.transpose(0, 2, 1, 3)
    while wide.ndim < 2:
        wide = wide[None]
    return wide.reshape(*wide.shape[:2], -1)


def _ratio(squares: Any, norms: Any) -> Any:
    """sqrt(squares / norms); 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares == 0, 0.0, np.sqrt(squares / norms))


def ranges(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"; no more than six pieces."""
    pieces: list[list[int]] = []
    for index in indices:
        if pieces and index == pieces[-1][1] + 1:
            pieces[-1][1] = index
        else:
            pieces.append([index, index])
    shown = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in pieces[:6])
    return shown + (f" and {len(pieces) - 6} more" if len(pieces) > 6 else "")
