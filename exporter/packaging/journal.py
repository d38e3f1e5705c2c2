"""The data file and the journal beside it: what makes an interrupted export resumable.

The data file is written from start to end. After each slot, a line in the journal records where it
ends and the SHA-256 of its bytes. Resuming trusts nothing: it reads the slots in the journal again,
keeps those whose hash is right, and continues after the last of them. Writing and resuming both
compute the hash of the whole file on the way, so that it is not read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.listing import WORKING_FILES
from llama_onnx.targets.lock import locked
from llama_onnx.targets.strict_json import JSONError, parse_json

JOURNAL_FILE, _, LOCK_FILE = WORKING_FILES

_READ = 1 << 22
_TYPES = {"slot": str, "end": int, "sha256": str}


@dataclass(frozen=True)
class Entry:
    """One finished slot: its bytes, with the padding before them, end at `end`."""

    slot: str
    end: int
    sha256: str


def write_header(path: Path, identity: Mapping[str, Any]) -> None:
    """Start the journal at `path` with what must not change between start and resumption."""
    _replace_text(path, json.dumps(dict(identity)) + "\n")


def _replace_text(path: Path, text: str) -> None:
    # Replaced in one step, so that a kill never leaves a journal without its first line.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def exclusive(folder: Path) -> AbstractContextManager[Callable[[], None]]:
    """Lock `folder` for this process; raises `UsageError` when another process holds the lock.

    Returns what `locked` returns.
    """
    busy = f"another export is writing to {folder}: wait for it, or stop it."
    return locked(folder / LOCK_FILE, busy)


def read_journal(path: Path, identity: Mapping[str, Any]) -> list[Entry]:
    """Read the entries of the journal at `path`, which must have the same `identity`.

    A line cut short by a kill ends the list. Raises a `UsageError` that names what changed.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    header = _parse(lines[0]) if lines else None
    current = json.loads(json.dumps(dict(identity)))
    if header is None:
        raise UsageError(f"{path} is damaged: start over with --force.")
    changed = [key for key in current if current[key] != header.get(key)]
    if changed:
        raise UsageError(
            f"cannot resume {path.parent}: {' and '.join(changed)} changed since it was begun: "
            "repeat the first call's options, or start over with --force."
        )
    entries = []
    for line in lines[1:]:
        raw = _parse(line)
        if raw is None or {k: type(v) for k, v in raw.items()} != _TYPES:
            break
        entries.append(Entry(**raw))
    return entries


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = parse_json(line.encode("utf-8", "replace"))
    except JSONError:
        return None
    return value if isinstance(value, dict) else None


class DataWriter:
    """Writes the data file from start to end; use as a context manager.

    `position` is the next byte, `finished` has the slots that are complete.
    """

    def __init__(self, folder: Path, data_file: str) -> None:
        self._data, self._journal_path = folder / data_file, folder / JOURNAL_FILE
        self._whole, self._slot = hashlib.sha256(), hashlib.sha256()
        self.position = 0
        self.finished: list[str] = []
        self._file: BinaryIO

    def __enter__(self) -> DataWriter:
        self._file = self._data.open("r+b" if self._data.exists() else "w+b")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def recover(self, entries: Sequence[Entry], progress: Callable[[int], None]) -> None:
        """Check `entries` against the bytes on disk and keep those that match.

        Calls `progress` after each slot with the number of bytes that matched so far. Writing then
        continues after the last good slot; the rest of the file is cut off.
        """
        good = list(takewhile(lambda entry: self._matches(entry, progress), entries))
        self.finished = [entry.slot for entry in good]
        self._rewind(good)

    def _matches(self, entry: Entry, progress: Callable[[int], None]) -> bool:
        digest, whole, left = hashlib.sha256(), self._whole.copy(), entry.end - self.position
        while left > 0:
            block = self._file.read(min(left, _READ))
            if not block:
                return False
            digest.update(block)
            whole.update(block)
            left -= len(block)
        if digest.hexdigest() != entry.sha256:
            return False
        self._whole, self.position = whole, entry.end
        progress(self.position)
        return True

    def _rewind(self, entries: Sequence[Entry]) -> None:
        self._file.seek(self.position)
        self._file.truncate()
        header = self._journal_path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
        lines = [header, *(json.dumps(vars(entry)) for entry in entries)]
        _replace_text(self._journal_path, "\n".join(lines) + "\n")

    def pad_to(self, offset: int) -> None:
        """Fill with zeros up to `offset`."""
        self.write(b"\0" * (offset - self.position))

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._file.write(data)
        self._whole.update(data)
        self._slot.update(data)
        self.position += len(data)

    def finish_slot(self, name: str) -> None:
        """Record in the journal that the slot `name` ends here."""
        self._file.flush()
        entry = Entry(name, self.position, self._slot.hexdigest())
        with self._journal_path.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(vars(entry)) + "\n")
        self._slot = hashlib.sha256()
        self.finished.append(name)

    def sync(self) -> None:
        """Flush the file to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """Return the SHA-256 of everything written so far."""
        return self._whole.hexdigest()
