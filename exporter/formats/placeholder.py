"""Files that a download left in place of the real ones."""

from __future__ import annotations

from typing import BinaryIO

from llama_onnx.targets.errors import CheckpointError

_LFS = b"version https://git-lfs.github.com/spec/"
_LENGTH = 200


def refuse_placeholder_file(path: object, file: BinaryIO) -> None:
    """Look at the start of `file` and return to it; see `refuse_placeholder`."""
    refuse_placeholder(path, file.read(_LENGTH))
    file.seek(0)


def refuse_placeholder(path: object, content: bytes) -> None:
    """Raise `CheckpointError` if `content`, or its start, is not that of the file named `path`, but
    Git LFS's pointer to it, or a page from a web server."""
    begin = content[:_LENGTH]
    if begin.startswith(_LFS):
        raise CheckpointError(
            f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its "
            "folder, or download it again."
        )
    if begin.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(
            f"{path} is a web page, not the file itself: download it again; the hub's `resolve` "
            "links lead to files, its `blob` links to pages."
        )
