"""Numbers in a stranger's certificate."""

from __future__ import annotations

import math
from typing import Any


def as_number(value: Any) -> float:
    """Return a figure; raise `ValueError` for what is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a figure that is not a number")
    return float(value)


def as_count(value: Any) -> int:
    """Return a count; raise `ValueError` for what is not a whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError("a count that is not a positive whole number")
    return value
