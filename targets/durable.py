"""Write files so that they survive a power cut: whole or not at all.

A rename is atomic, but not durable: after a power cut the new name may be there and the content
not, unless the content, and then the folder that has the name, were flushed to the disk.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT)


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which has its old content or this one at every moment."""
    temporary = path.with_name(path.name + ".tmp")
    # A stranger's folder may have a link there: what it leads to must not be written.
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as file:
        file.write(content)
    flush(temporary)
    temporary.replace(path)
    flush(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file, which only its owner can read, and call it `path` after the block.

    `path` has its old content until then, also if the block raises, which removes the new file, or
    the process is killed. Each writer has a file of its own: the last one to finish wins.
    """
    import tempfile  # only now: each command starts by importing this module

    descriptor, name = tempfile.mkstemp(prefix=".llama-onnx-", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        flush(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def is_full(error: OSError) -> bool:
    """Return whether `error` means that the disk is full, or the user's share of it."""
    if error.errno in _FULL:
        return True
    import shutil  # only now: each command starts by importing this module

    # copytree gathers the errors of its files in one, which has only their texts.
    return isinstance(error, shutil.Error) and any(os.strerror(n) in str(error) for n in _FULL)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    if path.is_dir():
        if sys.platform != "win32":  # Windows cannot open a folder, and flushes names by itself
            _flush(path, os.O_RDONLY)
    else:
        # Windows flushes only what is open for writing.
        _flush(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)


def flush_tree(folder: Path) -> None:
    """Flush all files below `folder`, and all folders, to the disk; then rename it."""
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            flush(Path(path, name))
        flush(Path(path))


def rename_folder(folder: Path, out: Path) -> None:
    """Flush all of `folder` to the disk, rename it to `out`, and flush the new name."""
    flush_tree(folder)
    folder.rename(out)
    flush(out.parent)


def _flush(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
