"""Where the records of an uncompressed zip file are; their bytes are not read.

`zipfile` is not used: it allocates what the end of the file says that the directory takes.
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

MAX_DIRECTORY = 8 << 20
"""Largest directory, in bytes: a record takes about 80, and a model has some thousands."""

_LOCAL, _CENTRAL = b"PK\3\4", b"PK\1\2"
_END, _LOCATOR, _END64 = b"PK\5\6", b"PK\6\7", b"PK\6\6"
_END_SIZE, _LOCATOR_SIZE, _END64_SIZE = 22, 20, 56
_CENTRAL_SIZE, _LOCAL_SIZE = 46, 30
_MAX_COMMENT = 0xFFFF
_ALL_ONES = 0xFFFFFFFF  # the value is in the record's zip64 field
_ZIP64_FIELD = 1
_ENCRYPTED = 1


class ZipError(ValueError):
    """The file is not a whole zip file, or contradicts itself."""


class CompressedError(ZipError):
    """A record is compressed or encrypted."""


@dataclass(frozen=True)
class Record:
    """`size` bytes at byte `offset` of the file."""

    name: str
    offset: int
    size: int


def read_records(file: BinaryIO) -> dict[str, Record]:
    """Return the records of the zip `file` by name.

    Raises `ZipError` for a damaged file and for records that overlap or share a name: two readers
    might read different ones. Raises `CompressedError` for records that are not stored as they are.
    """
    try:
        start, size = _find_directory(file)
        file.seek(start)
        directory = file.read(size)
        entries = list(_entries(directory))
        records = [_locate(file, *entry) for entry in entries]
    except (struct.error, UnicodeDecodeError):
        raise ZipError("a header is cut off") from None
    by_name = {record.name: record for record in records}
    if len(by_name) < len(records):
        raise ZipError("two records have the same name")
    end = 0
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < end:
            raise ZipError("two records overlap")
        end = record.offset + record.size
    if end > start:
        raise ZipError("a record extends into the directory")
    return by_name


def _find_directory(file: BinaryIO) -> tuple[int, int]:
    """Return offset and size of the directory, checked against the file."""
    length = file.seek(0, os.SEEK_END)
    tail_start = max(0, length - _END_SIZE - _MAX_COMMENT)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0:
        raise ZipError("it has no directory")
    size, start = struct.unpack_from("<II", tail, at + 12)
    end = tail_start + at
    if at >= _LOCATOR_SIZE and tail[at - _LOCATOR_SIZE :].startswith(_LOCATOR):
        (end,) = struct.unpack_from("<Q", tail, at - _LOCATOR_SIZE + 8)
        if end + _END64_SIZE > length:
            raise ZipError("its directory is beyond the end")
        file.seek(end)
        record = file.read(_END64_SIZE)
        if not record.startswith(_END64):
            raise ZipError("it has no directory")
        size, start = struct.unpack_from("<QQ", record, 40)
    if start + size > end:
        raise ZipError("its directory is beyond the end")
    if size > MAX_DIRECTORY:
        raise ZipError(f"its directory has {size:,} bytes")
    return start, size


def _entries(directory: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield name, size and offset of the local header of each record."""
    position = 0
    while position < len(directory):
        if not directory.startswith(_CENTRAL, position):
            raise ZipError("its directory is damaged")
        flags, method = struct.unpack_from("<HH", directory, position + 8)
        packed, size, *lengths = struct.unpack_from("<IIHHH", directory, position + 20)
        (offset,) = struct.unpack_from("<I", directory, position + 42)
        name_end = position + _CENTRAL_SIZE + lengths[0]
        extra = directory[name_end : name_end + lengths[1]]
        if name_end + lengths[1] > len(directory):
            raise ZipError("its directory is cut off")
        size, packed, offset = _zip64_values(extra, size, packed, offset)
        if method or flags & _ENCRYPTED or packed != size:
            raise CompressedError("it is compressed")
        yield directory[position + _CENTRAL_SIZE : name_end].decode("utf-8"), size, offset
        position = name_end + lengths[1] + lengths[2]


def _zip64_values(extra: bytes, *values: int) -> list[int]:
    """Return `values`, those that did not fit replaced by their 64-bit ones in `extra`."""
    wide: tuple[int, ...] = ()
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == _ZIP64_FIELD:
            wide = struct.unpack_from(f"<{min(length, 24) // 8}Q", extra, position + 4)
        position += 4 + length
    left = iter(wide)
    found = [next(left, None) if value == _ALL_ONES else value for value in values]
    if None in found:
        raise ZipError("a 64-bit size is missing")
    return [value for value in found if value is not None]


def _locate(file: BinaryIO, name: str, size: int, header: int) -> Record:
    file.seek(header)
    local = file.read(_LOCAL_SIZE)
    if not local.startswith(_LOCAL):
        raise ZipError("a record has no header")
    name_size, extra_size = struct.unpack_from("<HH", local, 26)
    if file.read(name_size) != name.encode("utf-8"):
        raise ZipError("a record has two names")
    return Record(name, header + _LOCAL_SIZE + name_size + extra_size, size)
