"""Numbers from a caller or a file, which may be of any type and size."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def as_whole(value: Any) -> int | None:
    """Return `value` as an int, NumPy's included; None unless it is a whole number.

    True and 3.0 are not: they come from a mistake more often than from an intention.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value)


def as_float(value: Any) -> float | None:
    """Return `value` as a float, NumPy's included; None unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
