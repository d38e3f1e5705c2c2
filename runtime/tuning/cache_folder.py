"""The user's cache folder, and whether what is in it can be trusted."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from llama_onnx.targets.durable import flush_tree
from llama_onnx.targets.errors import ResourceError, describe_reason

NAME = "llama-onnx"

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class UntrustedError(Exception):
    """A file or folder that somebody else could have written; `str()` says why."""


def cache_folder(
    platform: str = sys.platform, environment: Mapping[str, str] = os.environ
) -> Path | None:
    """Return where this user's programs cache files; None if the system does not say.

    XDG's rules on Linux: a folder that is not absolute does not count.
    """
    if platform == "win32":
        local = environment.get("LOCALAPPDATA")
        return Path(local, NAME, "Cache") if local else None
    home = _home(environment)
    if platform == "darwin":
        return home / "Library/Caches" / NAME if home else None
    named = Path(environment.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / NAME
    return home / ".cache" / NAME if home else None


def make_private(root: Path, folder: Path) -> None:
    """Make `folder` below `root`, and all folders between, for this user only.

    Raises `ResourceError` if that cannot be, or if others could write there.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for each in _between(root, folder):
            each.mkdir(mode=0o700, exist_ok=True)
        check_private(root, folder)
    except UntrustedError as problem:
        raise ResourceError(
            f"{problem}: nothing is kept there; make it writable for you alone."
        ) from None
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be made: {describe_reason(error)}; make its parent writable, or set "
            "another folder for caches."
        ) from None


def check_private(root: Path, path: Path) -> None:
    """Check `path`, and all folders from `root` to it, as ssh checks its keys.

    Each must be a real folder or file, not a link, of this user, and writable for nobody else.
    Windows keeps a user's folder from others by itself. Raises `UntrustedError`, and `OSError`
    for what is not there.
    """
    for each in _between(root, path):
        status = each.lstat()
        if not (stat.S_ISDIR(status.st_mode) or (each == path and stat.S_ISREG(status.st_mode))):
            raise UntrustedError(f"{each} is a link or no file")
        if sys.platform == "win32":
            continue
        if status.st_uid != os.geteuid():
            raise UntrustedError(f"{each} belongs to another user")
        if status.st_mode & _OTHERS:
            raise UntrustedError(f"{each} is writable for other users")


@contextmanager
def new_folder(parent: Path, suffix: str, what: str) -> Iterator[Path]:
    """Yield a new folder in `parent` to write files to; then they are for this user only, and on
    the disk. After an error the folder is removed.

    Raises `ResourceError` if `what`, the plural of what is written, cannot be.
    """
    folder = Path(tempfile.mkdtemp(suffix=suffix, dir=parent))
    try:
        yield folder
        for file in folder.iterdir():
            file.chmod(0o600)
        flush_tree(folder)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise ResourceError(
                f"{what} cannot be written to {parent}: {describe_reason(error)}."
            ) from None
        raise


def shortage(folder: Path, needed: int) -> str | None:
    """Return how much less than `needed` bytes is free where `folder` is; None if enough is."""
    free = shutil.disk_usage(folder).free
    if free > needed:
        return None
    return f"{folder} has {free / 1e9:.1f} GB free, and this needs up to {needed / 1e9:.1f} GB"


def _between(root: Path, path: Path) -> list[Path]:
    below = path.relative_to(root).parts
    return [root.joinpath(*below[:depth]) for depth in range(len(below) + 1)]


def _home(environment: Mapping[str, str]) -> Path | None:
    try:
        home = Path(environment.get("HOME") or Path.home())
    except RuntimeError:  # this user has none
        return None
    return home if home.is_absolute() else None
