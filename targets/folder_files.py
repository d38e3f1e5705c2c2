"""Open a file that a stranger's folder names: it must be in that folder, and a regular file."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from llama_onnx.targets.errors import CheckpointError, LlamaOnnxError

_WINDOWS_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{d}{n}" for d in ("com", "lpt") for n in range(10)),
}


_MOST_PARTS = 32
"""Most folders, and a file, that a name leads through."""


def is_plain_name(name: str) -> bool:
    """Return whether `name` is a relative path that stays below its folder on every system.

    >>> [is_plain_name(name) for name in ("model.onnx", "adapters/fox.bin", "../x", "C:x", "a/NUL")]
    [True, True, False, False, False]
    """
    parts = name.split("/")
    if not name.isprintable() or any(mark in name for mark in '\\:*?"<>|'):
        return False
    if len(parts) > _MOST_PARTS:  # what walks a folder would run out of stack
        return False
    return all(
        part not in ("", ".", "..")
        and part[-1] not in ". "
        and part.partition(".")[0].rstrip().lower() not in _WINDOWS_DEVICES
        for part in parts
    )


def file_inside(
    folder: Path, name: str, error: type[LlamaOnnxError] = CheckpointError
) -> Path | None:
    """Return the path of the file `name` in `folder`; None if there is no such file.

    Every name that comes from a stranger (a name in an index, or a well-known name in a stranger's
    folder) goes through here before it is opened. A link may lead to another place inside the
    folder, or, in the hub's cache, to that model's blobs. Raises `error` for a name that leads out
    of the folder or nowhere, and for anything but a regular file: opening a FIFO would wait for
    ever.
    """
    if not is_plain_name(name):
        raise error(f"{folder} names the file {name!r}, which is not a plain name inside it.")
    path = folder / name
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as problem:
        raise error(f"{path} cannot be read: {_reason(problem)}.") from None
    try:
        if stat.S_ISLNK(status.st_mode):
            status = path.stat()
        real = path.resolve(strict=True)
    except FileNotFoundError:  # a part of the hub's cache was removed, or never downloaded
        raise error(f"{path} is a link that leads nowhere: download the file again.") from None
    except (OSError, RuntimeError) as problem:  # a loop of links is a RuntimeError before 3.13
        raise error(f"{path} cannot be read: {_reason(problem)}.") from None
    if not any(real.is_relative_to(root) for root in _roots(folder)):
        raise error(
            f"{path} is a link that leads out of its folder: replace it with the file itself."
        )
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path} is not a regular file: remove it.")
    return path


def open_inside(folder: Path, name: str, error: type[LlamaOnnxError] = CheckpointError) -> BinaryIO:
    """Open the file `name` in `folder` for reading bytes; see `file_inside`. Raises `error` also if
    there is no such file, or if it cannot be opened."""
    path = file_inside(folder, name, error)
    if path is None:
        raise error(f"{folder} has no {name}.")
    try:
        return path.open("rb")
    except OSError as problem:
        raise error(f"{path} cannot be read: {_reason(problem)}.") from None


def read_inside(
    folder: Path, name: str, error: type[LlamaOnnxError] = CheckpointError, *, max_bytes: int
) -> bytes:
    """Return the content of the file `name` in `folder`; see `open_inside`. Raises `error` also for
    a file of more than `max_bytes`, of which no more is read."""
    with open_inside(folder, name, error) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as problem:
            raise error(f"{folder / name} cannot be read: {_reason(problem)}.") from None
    if len(content) > max_bytes:
        raise error(
            f"{folder / name} has more than {max_bytes:,} bytes, which no such file needs: replace "
            "it with the original."
        )
    return content


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that a link in `folder` may lead to."""
    real = folder.resolve()
    # The hub's cache: models--OWNER--NAME/snapshots/COMMIT/FILE is a link to ../../blobs/HASH.
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return (real, real.parent.parent / "blobs")
    return (real,)


def _reason(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or "a loop of links"
