"""No waiting for the disk: what a test would see after a power failure, no test looks at.

A run flushes twenty thousand files, and each flush waits for what every other program of the
machine is writing. `tests/targets/test_durable.py` checks what is flushed when, with `FLUSH`.
"""

from __future__ import annotations

import os

import pytest

FLUSH = os.fsync


def skip_flushes(patch: pytest.MonkeyPatch) -> None:
    """Let `os.fsync` do nothing but refuse what is not an open file."""
    patch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor) and None)
