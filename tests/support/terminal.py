"""A program in a terminal of its own."""

from __future__ import annotations

import os
import re
import select


def read_until(terminal: int, pattern: bytes) -> None:
    """Read what the program writes to its terminal until `pattern` matches."""
    seen = b""
    while not re.search(pattern, seen):
        ready, _, _ = select.select([terminal], [], [], 30)
        assert ready, f"waited 30 s for {pattern!r} after {seen!r}"
        seen += os.read(terminal, 4096)
