"""`checklist.chk`: the md5 sum of every file of Meta's download, in the format of `md5sum`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside, is_plain_name, open_inside, read_inside

_BLOCK = 1 << 20
_MAX_BYTES = 1 << 20  # of a checklist, which has 34 bytes and a name for each file


def verify_checklists(folder: Path, step: Callable[[str], None]) -> dict[str, str]:
    """Hash every file named in a checklist in `folder` and return the md5 sums by file name.

    Calls `step` with a message before each file. Returns {} if there is no checklist. Raises
    `CheckpointError` for a file that is missing or differs.
    """
    sums = {}
    for checklist in _checklists(folder):
        for md5, path in _entries(checklist):
            step(f"checking {path.name}")
            if _md5(path) != md5:
                raise CheckpointError(
                    f"{path} does not have the checksum in {checklist.name}: download it again, "
                    "or pass --no-checksum (checksum=False in Python) if you changed it."
                )
            sums[path.name] = md5
    return sums


def has_checklist(path: Path) -> bool:
    """Return whether the checkpoint at `path`, a folder or a file, has a checklist."""
    return path.is_dir() and bool(_checklists(path))


def _checklists(folder: Path) -> list[Path]:
    # A download of several models has one tokenizer, in the parent folder.
    above = [] if (folder / "tokenizer.model").exists() else [folder.resolve().parent]
    found = [folder / "checklist.chk"]
    found += [place / "tokenizer_checklist.chk" for place in (folder, *above)]
    return [path for path in found if file_inside(path.parent, path.name)]


def _entries(checklist: Path) -> Iterator[tuple[str, Path]]:
    try:
        content = read_inside(checklist.parent, checklist.name, max_bytes=_MAX_BYTES)
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise CheckpointError(f"{checklist} cannot be read: download it again.") from None
    for line in filter(None, map(str.strip, lines)):
        md5, _, name = line.partition(" ")
        name = name.strip().removeprefix("*")
        if len(md5) != 32 or "/" in name or not is_plain_name(name):
            raise CheckpointError(f"{checklist} has a line that is not a checksum: {line[:80]!r}.")
        yield md5.lower(), checklist.with_name(name)


def _md5(path: Path) -> str:
    # Used for integrity, not security: Meta publishes no other checksum.
    md5 = hashlib.md5(usedforsecurity=False)
    if file_inside(path.parent, path.name) is None:
        raise CheckpointError(
            f"{path.parent} lacks {path.name}, which its checklist names: download it."
        )
    try:
        with open_inside(path.parent, path.name) as file:
            while block := file.read(_BLOCK):
                md5.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    return md5.hexdigest()
