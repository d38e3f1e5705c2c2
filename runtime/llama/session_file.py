"""The file of a saved conversation: safetensors, with JSON in its metadata.

The metadata has `format`, `session`, a JSON object as text, and `session_sha256`. The tensors are
`tokens` and, where a cache was saved, those of the graph's cache inputs for the first of the
tokens, [kv_heads, positions, head_size] each. `data_sha256` in the object covers all of them.

A file may be a stranger's: nothing is allocated before its sizes were compared with the graph's.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.cache_layout import Block, CacheLayout
from llama_onnx.targets.durable import is_full, replacing
from llama_onnx.targets.errors import ResourceError, SessionError, describe_reason
from llama_onnx.targets.strict_json import JSONError, parse_json

_FORMAT = "llama-onnx session "
_VERSION = "1"
_METADATA, _TOKENS = "__metadata__", "tokens"
_SESSION, _SESSION_HASH, _DATA_HASH = "session", "session_sha256", "data_sha256"
_NO_HASH = "0" * 64

_CODES: Mapping[type[np.generic], str] = {
    np.float64: "F64",
    np.float32: "F32",
    np.float16: "F16",
    np.int8: "I8",
    np.uint8: "U8",
    np.int32: "I32",
}
"""Types -> their names in the format."""

_MAX_HEADER = 64 << 20
"""In bytes: ten times the text that a context of a million tokens holds."""

Array = npt.NDArray[Any]


def write_session(
    path: Path, content: Mapping[str, Any], tokens: npt.NDArray[np.integer], block: Block
) -> None:
    """Write a session, one part of `block` after the other; `path` is the old file until the end.

    Raises `SessionError` if it cannot be written, `ResourceError` if the disk is full.
    """
    parts: dict[str, Array] = {_TOKENS: tokens.astype(np.int32), **block}
    try:
        with replacing(_target(path)) as file:
            length = len(_header(content, parts, _NO_HASH))
            file.write(struct.pack("<Q", length))
            file.seek(8 + length)
            digest = hashlib.sha256()
            for part in parts.values():
                flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                digest.update(flat.data)
                file.write(flat.data)
            file.seek(8)
            file.write(_header(content, parts, digest.hexdigest()))
    except OSError as error:
        if is_full(error):
            raise ResourceError(f"{path} cannot be written: the disk is full.") from None
        raise SessionError(f"{path} cannot be written: {describe_reason(error)}.") from None


def check_writable(path: Path) -> None:
    """Raise `SessionError` if no session can be written to `path`, as far as that can be seen."""
    folder = _target(path).parent
    if not folder.is_dir():
        raise SessionError(f"{path} cannot be written: {folder} is not a folder.")
    if not os.access(folder, os.W_OK):
        raise SessionError(f"{path} cannot be written: nothing may be written to {folder}.")


def _target(path: Path) -> Path:
    """Return the file that `path` is or leads to; raise `SessionError` for anything but a file."""
    try:
        real = Path(os.path.realpath(path))
        if real.exists() and not real.is_file():
            raise SessionError(f"{path} is not a regular file: choose another name.")
    except (OSError, ValueError) as error:
        raise SessionError(f"{path} cannot be used: {describe_reason(error)}.") from None
    return real


def _header(content: Mapping[str, Any], parts: Mapping[str, Array], digest: str) -> bytes:
    """Return the header, whose length does not depend on `digest`."""
    session = json.dumps({**content, _DATA_HASH: digest}, ensure_ascii=False)
    metadata = {
        "format": _FORMAT + _VERSION,
        _SESSION: session,
        _SESSION_HASH: hashlib.sha256(session.encode()).hexdigest(),
    }
    kinds = {name: (part.shape, part.dtype.type) for name, part in parts.items()}
    header = {_METADATA: metadata, **_entries(kinds)}
    text = json.dumps(header, ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _entries(kinds: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]) -> dict[str, Any]:
    """Return the header's entries for tensors that follow one another."""
    entries, start = {}, 0
    for name, (shape, kind) in kinds.items():
        end = start + int(np.prod(shape, dtype=object)) * np.dtype(kind).itemsize
        entries[name] = {
            "dtype": _CODES[kind],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    return entries


@dataclass(frozen=True)
class SessionFile:
    """An open session: its JSON `content`, and its tensors, which have not been read.

    Attributes:
        path: Where it is, for messages.
        content: What it says.
        entries: The tensors by name, as the header has them.
        start: Where the tensors begin in `file`, which has `size` bytes.
    """

    path: Path
    content: Mapping[str, Any]
    entries: Mapping[str, Any]
    start: int
    size: int
    file: BinaryIO

    def __enter__(self) -> SessionFile:
        """Return the session itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.file.close()

    def lengths(self) -> tuple[int, int]:
        """Return how many tokens it has, and for how many of them a cache."""
        tokens = self._length(_TOKENS, 0)
        others = [name for name in self.entries if name != _TOKENS]
        return tokens, self._length(others[0], 1) if others else 0

    def _length(self, name: str, axis: int) -> int:
        entry = self.entries.get(name)
        shape = entry.get("shape") if isinstance(entry, dict) else None
        length = shape[axis] if isinstance(shape, list) and len(shape) == 2 * axis + 1 else None
        if type(length) is not int or length < 0:
            raise self.damaged("a tensor has no shape")
        return length

    def check(self, layout: CacheLayout) -> None:
        """Raise `SessionError` unless the tensors are those of a session of a graph's caches."""
        tokens, positions = self.lengths()
        kinds: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            _TOKENS: ((tokens,), np.int32)
        }
        if positions:
            kinds |= layout.shapes(positions)
        expected = _entries(kinds)
        if self.entries != expected or positions > tokens:
            raise self.damaged("its tensors are not those of this package's cache")
        end = expected[next(reversed(expected))]["data_offsets"][1]
        if self.start + end != self.size:
            raise self.damaged(
                f"it has {self.size:,} bytes, but its header says {self.start + end:,}"
            )

    def read(self, layout: CacheLayout) -> tuple[npt.NDArray[np.int64], dict[str, Array]]:
        """Return the tokens and the cache of a session that was checked, reading part by part."""
        tokens, positions = self.lengths()
        digest = hashlib.sha256()
        self.file.seek(self.start)
        ids = self._take((tokens,), np.int32, digest)
        if ids.size and not 0 <= ids.min() <= ids.max() < layout.vocab_size:
            raise self.damaged("it has an id that is not a token of this package")
        block = {}
        for name, (shape, kind) in layout.shapes(positions).items() if positions else ():
            part = self._take(shape, kind, digest)
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                raise self.damaged(f"{name} has what is not a number")
            block[name] = part
        if digest.hexdigest() != self.content.get(_DATA_HASH):
            raise self.damaged("its tensors were changed")
        return ids.astype(np.int64), block

    def _take(self, shape: tuple[int, ...], kind: type[np.generic], digest: Any) -> Array:
        part: Array = np.empty(shape, kind)
        flat = part.reshape(-1).view(np.uint8)
        if self.file.readinto(flat.data) != flat.size:  # type: ignore[attr-defined]
            raise self.damaged("it was cut")
        digest.update(flat.data)
        return part

    def damaged(self, what: str) -> SessionError:
        """Return the error for a file that is not as it was written."""
        return SessionError(f"{self.path} is damaged ({what}): remove it, or choose another file.")


def open_session(path: Path) -> SessionFile:
    """Open the file of a session; raise `SessionError` unless its header is sound."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SessionError(f"{path} is not a regular file: choose another one.")
        file = path.open("rb")
    except (OSError, ValueError) as error:
        raise SessionError(f"{path} cannot be read: {describe_reason(error)}.") from None
    try:
        return _read_header(path, file)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise SessionError(f"{path} cannot be read: {describe_reason(error)}.") from None
        raise


def _read_header(path: Path, file: BinaryIO) -> SessionFile:
    foreign = SessionError(f"{path} is not a session of llama-onnx: choose another file.")
    size, prefix = os.fstat(file.fileno()).st_size, file.read(8)
    (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (size,)
    if length > min(size - 8, _MAX_HEADER):
        raise foreign
    try:
        header = parse_json(file.read(length), unique=True)
    except JSONError:
        raise foreign from None
    metadata = header.pop(_METADATA, None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not str(metadata.get("format")).startswith(_FORMAT):
        raise foreign
    if metadata["format"] != _FORMAT + _VERSION:
        raise SessionError(
            f"{path} is a session of another version of llama-onnx: choose another file."
        )
    opened = SessionFile(path, {}, header, 8 + length, size, file)
    text = str(metadata.get(_SESSION)).encode()
    if hashlib.sha256(text).hexdigest() != metadata.get(_SESSION_HASH):
        raise opened.damaged("its text was changed")
    try:
        content = parse_json(text, unique=True)
    except JSONError as error:
        raise opened.damaged(f"its text {error}") from None
    if not isinstance(content, dict):
        raise opened.damaged("its text is not an object")
    return SessionFile(path, content, header, 8 + length, size, file)
