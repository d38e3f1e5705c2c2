"""What is finished of numbered work, in a file that any end of the process leaves usable.

The first line says what the work is. Each further line is a finished part: a checksum, the part's
number, and its content. A line cut short by a kill or a full disk ends the list, and is cut off
when the work goes on.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import Any

from llama_onnx.targets.durable import is_full
from llama_onnx.targets.errors import ResourceError, UsageError
from llama_onnx.targets.lock import locked
from llama_onnx.targets.strict_json import JSONError, parse_json

_FLUSH_SECONDS = 2.0
_LONGEST_HEADER = 1 << 16
_FORCED = "force"


class Journal:
    """The finished parts of a work of `count` parts; `open_journal` opens one.

    `done` has a byte for each part, 1 for the finished ones. Set `over` when nobody needs the
    journal any more: it is removed then.
    """

    def __init__(self, path: Path, file: FileIO, count: int, end: int) -> None:
        self.path, self._file = path, file
        self.done = bytearray(count)
        self._places = array("q", bytes(8 * count))
        self._end, self._flushed = end, monotonic()
        self.finished, self.over = 0, False

    def add(self, number: int, content: bytes) -> bool:
        """Keep the content of a part, which has no line feed; False if it was finished before.

        Raises `ResourceError` if the disk is full: what was finished stays.
        """
        if self.done[number]:
            return False
        body = b"%d %b" % (number, content)
        record = b"%08x %b\n" % (zlib.crc32(body), body)
        try:
            _write(self._file, record)
            if monotonic() > self._flushed + _FLUSH_SECONDS:
                self.flush()
        except OSError as error:
            raise full(self.path, error, self.finished) from None
        self._note(number, len(record))
        return True

    def flush(self) -> None:
        """Flush everything to the disk."""
        os.fsync(self._file.fileno())
        self._flushed = monotonic()

    def contents(self) -> Iterator[bytes]:
        """Yield the contents of the finished parts in their order."""
        with self.path.open("rb") as file:
            for place, done in zip(self._places, self.done, strict=True):
                if done:
                    file.seek(place)
                    yield file.readline().rstrip(b"\n").split(b" ", 2)[2]

    def recover(self) -> None:
        """Find the finished parts, and cut off what follows the last sound line."""
        with self.path.open("rb") as file:
            file.seek(self._end)
            for record in file:
                number = _number(record, len(self.done))
                if number is None:
                    break
                if self.done[number]:
                    self._end += len(record)
                else:
                    self._note(number, len(record))
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def _note(self, number: int, length: int) -> None:
        self.done[number], self._places[number] = 1, self._end
        self._end += length
        self.finished += 1


def _number(record: bytes, count: int) -> int | None:
    """Return the number of the part in a line, None for a line that is not sound."""
    checksum, _, body = record.rstrip(b"\n").partition(b" ")
    if not record.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
        return None
    number = int(body.split(b" ", 1)[0])
    return number if number < count else None


def full(path: Path, error: OSError, finished: int) -> ResourceError:
    """Return the error for a file that could not be written."""
    kept = (
        f"finished parts ({finished:,}) are kept: run the same command without --force to continue"
    )
    if is_full(error):
        return ResourceError(
            f"{path} cannot be written, the disk is full: free some space; {kept}."
        )
    return ResourceError(f"{path} cannot be written: {error.strerror or error}; {kept}.")


@contextmanager
def open_journal(
    path: Path, identity: Mapping[str, Any], count: int, *, force: bool = False
) -> Iterator[Journal]:
    """Open the journal at `path`, or begin one with `force` or if there is none, and lock it.

    One without a finished part is removed at the end. `identity` is what must be the same when the
    work goes on, in JSON values. Raises `UsageError` that names what changed, or if another
    process has the journal.
    """
    busy = f"another process writes {path}: wait for it, or stop it."
    with locked(path, busy) as unlock:
        raw = path.open("r+b", buffering=0)
        journal = None
        try:
            journal = _open(path, raw, identity, count, force)
            yield journal
        finally:
            if journal is not None and journal.finished and not journal.over:
                with suppress(OSError):  # what was written is there all the same
                    journal.flush()
            raw.close()
            if journal is not None and (journal.over or not journal.finished):
                if sys.platform == "win32":  # which removes no file that is open
                    unlock()
                path.unlink()


def _open(path: Path, raw: FileIO, identity: Mapping[str, Any], count: int, force: bool) -> Journal:
    begun = None if force else _identity(path)
    if begun is not None:
        _check(path, begun.content, identity)
        journal = Journal(path, raw, count, begun.length)
        journal.recover()
        return journal
    header = json.dumps({**identity, _FORCED: force}).encode() + b"\n"
    try:
        raw.truncate(0)
        _write(raw, header)
    except OSError as error:
        with suppress(OSError):  # half a header would be taken for another program's file
            raw.truncate(0)
        raise full(path, error, 0) from None
    return Journal(path, raw, count, len(header))


def began_with_force(path: Path) -> bool:
    """Return whether there is a journal at `path` of work that may replace what is there.

    Raises `UsageError` for a file that is not a journal.
    """
    header = _identity(path) if path.is_file() else None
    begun = None if header is None else header.content
    return isinstance(begun, dict) and bool(begun.get(_FORCED))


def _write(file: FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


@dataclass(frozen=True)
class _Header:
    content: Any
    length: int


def _identity(path: Path) -> _Header | None:
    """Return the first line of a journal, None for one that has none yet."""
    with path.open("rb") as file:
        line = file.readline(_LONGEST_HEADER)
    if not line:
        return None
    try:
        return _Header(parse_json(line), len(line))
    except JSONError:
        raise UsageError(
            f"{path} is not a journal of this command: remove it, or start over with --force."
        ) from None


def _check(path: Path, begun: Any, identity: Mapping[str, Any]) -> None:
    old = begun if isinstance(begun, dict) else {}
    changed = [name for name, value in identity.items() if old.get(name) != value]
    if changed:
        raise UsageError(
            f"cannot go on with {path}: {' and '.join(changed)} changed since it was begun: repeat "
            "the first call's arguments, or start over with --force."
        )
