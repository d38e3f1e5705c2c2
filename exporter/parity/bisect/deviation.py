"""The deviation of one value of a graph from its expected value, and where it occurs."""

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
    """The relative L2 error of a value: `relative_l2` of all of it, `worst` of its worst position
    (infinite where the reference is zero).

    `positions` [B, S] marks those beyond the limit. `channels` [C] marks those that deviate, at
    some position, by more than ten times the limit, relative to the root mean square there; a value
    without channels counts as one channel.
    """

    relative_l2: float
    worst: float
    max_abs: float
    positions: npt.NDArray[np.bool_]
    channels: npt.NDArray[np.bool_]

    def within(self, limit: float) -> bool:
        """Return whether the whole is within `limit` and each position within ten times as much. A
        NaN never is."""
        return self.relative_l2 <= limit and self.worst <= 10 * limit


def deviation(expected: Array, found: Array, limit: float) -> Deviation:
    """Compare `found` with `expected` of the same shape, except where `expected` is NaN.

    Shapes: [B, S, ...]; with four dimensions [B, heads, S, head_dim].
    """
    wanted, seen = _by_position(expected), _by_position(found)
    counted = ~np.isnan(wanted)
    error = np.where(counted, seen - wanted, 0)  # [B, S, C]
    wanted = np.where(counted, wanted, 0)
    squares, norms = np.square(error).sum(-1), np.square(wanted).sum(-1)  # [B, S]
    each = _ratio(squares, norms)
    # A channel is measured against the root mean square of all channels at its position.
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
    """Return `value` as [B, S, C]."""
    wide = value.astype(np.float64)
    if wide.ndim == 4:
        wide = wide.transpose(0, 2, 1, 3)
    while wide.ndim < 2:
        wide = wide[None]
    return wide.reshape(*wide.shape[:2], -1)


def _ratio(squares: Any, norms: Any) -> Any:
    """Return sqrt(squares / norms), with 0 / 0 as 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares == 0, 0.0, np.sqrt(squares / norms))


def ranges(indices: Sequence[int]) -> str:
    """Return [0, 1, 2, 5] as "0-2, 5"; at most six ranges are named."""
    pieces: list[list[int]] = []
    for index in indices:
        if pieces and index == pieces[-1][1] + 1:
            pieces[-1][1] = index
        else:
            pieces.append([index, index])
    shown = ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in pieces[:6])
    return shown + (f" and {len(pieces) - 6} more" if len(pieces) > 6 else "")
