"""The header of a GGUF file: metadata and the location of each tensor.

`gguf.GGUFReader` is not used: it maps the whole file, keeps a view of every tensor and trusts each
length it finds, so that a damaged count sends it into an endless loop. The layout is published at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_onnx.exporter.formats.placeholder import refuse_placeholder_file
from llama_onnx.exporter.formats.tensor import check_name
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import shown

_MAGIC = b"GGUF"
_LEAST_SIZE = 24  # magic, version, number of tensors, number of keys
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # the default if general.alignment is not set
_STRING, _ARRAY = 8, 9
_MAX_STRING = 64 << 20  # in bytes: a file may contain a whole tokenizer.json
_MAX_HEADER = 128 << 20  # in bytes: Llama 3's has 8 MB
_MAX_VALUES = 4_000_000  # in all lists: Llama 3's vocabulary has 128,000 tokens, 280,000 merges
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape` has rows first; `offset` is in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A GGUF file's metadata by key, and its tensors by GGUF name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file `path`.

    Raises `CheckpointError` if the file is not a complete GGUF file, `UnsupportedError` for a
    version or tensor type that is not supported.
    """
    try:
        with path.open("rb") as file:
            refuse_placeholder_file(path, file)
            return _read(_Cursor(file, path, path.stat().st_size))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


class _Cursor:
    """Reads forward and never past the end of the file, even if the lengths in it are wrong."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file, self.path, self.size = file, path, size
        self._values = 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: its header requires {count:,} bytes at byte "
                f"{self.position:,}, but the file ends at {self.size:,}; download it again."
            )
        if self.position + count > _MAX_HEADER:
            raise CheckpointError(
                f"{self.path} has a header of more than {_MAX_HEADER:,} bytes, which no model "
                "needs: download it again."
            )
        return self._file.read(count)

    def counted(self) -> int:
        """Return the number of entries that follow; each takes a byte or more."""
        count = self.integer("Q")
        if count > self.size - self.position:
            raise CheckpointError(
                f"{self.path} is truncated or damaged: its header counts {count:,} entries, but "
                f"the file has {self.size:,} bytes; download it again."
            )
        return count

    def damage(self, what: str) -> CheckpointError:
        """Return the error for a file in which `what` is wrong."""
        return CheckpointError(f"{self.path} is damaged: {what}; download it again.")

    def integer(self, code: str) -> int:
        value: int = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]
        return value

    def string(self) -> str:
        length = self.integer("Q")
        if _MAX_STRING < length <= self.size:
            raise self.damage(f"a string in its header has {length:,} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damage("a string in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.integer("I"), self.counted())
        return self._scalars(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[Any]:
        self._values += count  # a value of one byte takes up to 80 in memory
        if self._values > _MAX_VALUES:
            raise self.damage(f"the lists in its header have more than {_MAX_VALUES:,} values")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self.damage(f"its header has a value of unknown type {kind}")
        values: list[Any] = np.frombuffer(self.take(dtype.itemsize * count), dtype).tolist()
        return values

    @property
    def position(self) -> int:
        return self._file.tell()


def _read(cursor: _Cursor) -> Header:
    _check_start(cursor)
    num_tensors, num_keys = cursor.counted(), cursor.counted()
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.damage(f"it has the key {shown(key)} twice")
        metadata[key] = cursor.value(cursor.integer("I"))
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    alignment = _alignment(metadata, cursor.path)
    base = -(-cursor.position // alignment) * alignment
    tensors = {entry[0]: _tensor(*entry, base, cursor) for entry in entries}
    if len(tensors) < num_tensors:
        raise cursor.damage("two of its tensors have the same name")
    end = base
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if (tensor.offset - base) % alignment:
            raise cursor.damage(f"{tensor.name} is not aligned to {alignment} bytes")
        if tensor.offset < end:
            raise cursor.damage(f"{tensor.name} overlaps another tensor")
        end = tensor.offset + tensor.nbytes
    return Header(metadata, tensors)


def _check_start(cursor: _Cursor) -> None:
    if cursor.take(min(4, cursor.size)) != _MAGIC:
        raise CheckpointError(
            f"{cursor.path} is not a GGUF file (it does not start with 'GGUF'): download it again "
            "and check that the link does not lead to a web page."
        )
    if cursor.size < _LEAST_SIZE:
        raise CheckpointError(
            f"{cursor.path} is truncated: it has {cursor.size} bytes, but a GGUF header has "
            f"{_LEAST_SIZE} or more; download it again."
        )
    version = cursor.integer("I")
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{cursor.path} is a big-endian GGUF file: convert the model again as little-endian."
        )
    if version not in _VERSIONS:
        raise UnsupportedError(
            f"{cursor.path} is GGUF version {version}, but only versions 2 and 3 can be read: "
            "convert the model again with a current llama.cpp."
        )


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    value = metadata.get("general.alignment", _ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise CheckpointError(
            f"{path}: general.alignment must be a power of two, not {shown(value)}."
        )
    return value


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    check_name(cursor.path, name)
    dims = cursor.integer("I")
    if not 1 <= dims <= 4:
        raise cursor.damage(f"{name} has {dims} dimensions")
    shape = tuple(cursor.integer("Q") for _ in range(dims))[::-1]
    if 0 in shape:
        raise cursor.damage(f"{name} has a dimension of 0")
    return name, shape, cursor.integer("I"), cursor.integer("Q")


def _tensor(
    name: str, shape: tuple[int, ...], code: int, offset: int, base: int, cursor: _Cursor
) -> TensorInfo:
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise UnsupportedError(
            f"{cursor.path}: {name} is stored as ggml type {code}, which is not supported."
        ) from None
    block, size = GGML_QUANT_SIZES[kind]
    elements = 1
    for dim in shape:
        elements *= dim
    if shape[-1] % block:
        raise CheckpointError(
            f"{cursor.path} is damaged: {name} is stored as {kind.name} in blocks of {block}, but "
            f"its rows have {shape[-1]} values; download it again."
        )
    end = base + offset + elements // block * size
    if end > cursor.size:
        raise CheckpointError(
            f"{cursor.path} is truncated: {name} ends at byte {end:,}, but the file has "
            f"{cursor.size:,} bytes; download it again."
        )
    return TensorInfo(name, shape, kind, base + offset, elements // block * size)
