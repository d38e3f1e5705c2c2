"""Sizes of memory and files as people write them: 500MB, 3.8GB, 2 GiB."""

from __future__ import annotations

import re

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([kmg]i?b)", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """Return the bytes that `text` means, at least 1; None if it means no size.

    >>> parse_size("3.8GB"), parse_size("2 GiB"), parse_size("2 apples")
    (3800000000, 2147483648, None)
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    return size if 0 < size < 1 << 60 else None
