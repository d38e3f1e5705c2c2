"""Numbers from a caller or a file, which may be of any type and size."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from llama_onnx.targets.printable import printable

_LONGEST = 40


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


def shown(value: Any) -> str:
    """Return a short text for `value` in a message.

    >>> shown(10**400), shown("x" * 100)
    ('a number of 401 digits', "'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...")
    """
    if isinstance(value, int) and value.bit_length() > 128:
        # Python refuses to write more than 4,300 digits; their number can be one too many.
        bits = value.bit_length()
        digits = len(str(abs(value))) if bits < 10_000 else math.floor(bits * math.log10(2)) + 1
        return f"a number of {digits:,} digits"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__}"
    text = printable(repr(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
