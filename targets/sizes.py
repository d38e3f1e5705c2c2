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


ALIGNMENT = 4096
"""Offsets of large tensors in a data file are multiples of a page in bytes, so that runtimes can
map them without copying."""

SMALL, SMALL_ALIGNMENT = 1 << 16, 64
"""Tensors of fewer bytes begin at a cache line: pages for each would be 1 % of a small model, and a
copy of them costs nothing."""


def next_offset(end: int, size: int) -> int:
    """Return where a tensor of `size` bytes begins in a data file that has `end` bytes so far.

    >>> next_offset(65, 10), next_offset(65, 1 << 20)
    (128, 4096)
    """
    unit = ALIGNMENT if size >= SMALL else SMALL_ALIGNMENT
    return -(-end // unit) * unit
