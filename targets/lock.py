"""A lock on a file, for one process at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_onnx.targets.errors import UsageError


@contextmanager
def locked(file: Path, busy: str) -> Iterator[Callable[[], None]]:
    """Lock `file` for this process; raise `UsageError` with the text `busy` if another one has it.

    Yields a function that gives the lock up early: Windows does not rename a folder with an open
    file in it. The system releases the lock when the process ends, even if it is killed.
    """
    with file.open("a+b") as opened:
        try:
            _lock(opened.fileno())
        except OSError:
            raise UsageError(busy) from None
        if not _is_there(file, opened.fileno()):  # the process that had it just removed the file
            raise UsageError(busy)
        yield opened.close


def _is_there(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
