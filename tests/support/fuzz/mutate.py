"""Changes to valid files that keep most of their structure, so that readers get past the start."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**19,
    -0.5,
    1e300,
    1e-300,
    "",
    "²",
    "\x00",
    "x" * 100_000,
    "../../x",
    [],
    [[]],
    {},
    {"a": {"b": None}},
)
"""In place of any value of a JSON file."""

TEXTS = (b"1e400", b"NaN", b"-Infinity", b'"\\ud800"', b"9" * 5000, b"[" * 5000 + b"]" * 5000)
"""The same, as text that `json.dumps` does not write."""

_MARK = "\ue000mark"
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def mutated(content: bytes, kind: str, rng: random.Random) -> bytes:
    """Return `content`, a file of `kind`, with one to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _KINDS[kind](content, rng)
    return content


def set_value(content: bytes, path: tuple[Any, ...], text: bytes) -> bytes:
    """Return the JSON `content` with the value at `path` replaced by the JSON `text`."""
    value = json.loads(content)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = _MARK
    return json.dumps(value).encode().replace(json.dumps(_MARK).encode(), text)


def paths(value: Any, depth: int = 4) -> list[tuple[Any, ...]]:
    """Return the places of all values in a JSON value, of long lists only the first few."""
    found: list[tuple[Any, ...]] = []
    if depth and isinstance(value, dict | list):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))[:200]
        for key, item in items:
            found += [(key,), *((key, *rest) for rest in paths(item, depth - 1))]
    return found


def _json(content: bytes, rng: random.Random) -> bytes:
    try:
        places = paths(json.loads(content))
    except (ValueError, RecursionError):
        places = []
    if not places or rng.random() < 0.1:
        return _bytes(content, rng)
    place = rng.choice(places)
    if rng.random() < 0.2:
        return set_value(content, place, rng.choice(TEXTS))
    if rng.random() < 0.1:  # the key again, with another value
        text = json.dumps({str(place[0]): rng.choice(VALUES)}).encode()
        return text[:-1] + b"," + content.lstrip()[1:]
    if rng.random() < 0.2:  # another value of the same file
        value = json.loads(content)
        for key in rng.choice(places):
            value = value[key]
        return set_value(content, place, json.dumps(value).encode())
    return set_value(content, place, json.dumps(rng.choice(VALUES)).encode())


def _bytes(content: bytes, rng: random.Random, span: int | None = None) -> bytes:
    data = bytearray(content)
    if not data:
        return rng.randbytes(rng.randint(0, 20))
    at = rng.randrange(min(span or len(data), len(data)))
    change = rng.randrange(7)
    if change == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif change == 1:
        data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    elif change in (2, 3):
        code, bits = rng.choice((("<H", 16), ("<I", 32), ("<Q", 64)))
        number = struct.pack(code, rng.choice(_NUMBERS) % (1 << bits))
        data[at : at + len(number)] = number
    elif change == 4:
        del data[at : at + rng.choice((1, 2, 8, len(data)))]
    elif change == 5:
        piece = data[at : at + rng.choice((1, 4, 8, 64))]
        data[at:at] = piece * rng.choice((1, 2, 100))
    else:
        data[at : at + 8] = rng.randbytes(8)
    return bytes(data)


def _header(content: bytes, rng: random.Random) -> bytes:
    return _bytes(content, rng, rng.choice((64, 1000, 30_000, None)))


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1 or len(content) < 8:
        return _header(content, rng)
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content):
        return _header(content, rng)
    header = _json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _torch(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return _bytes(content, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError):
        return _bytes(content, rng)
    name = rng.choice([name for name in records if name.endswith(("data.pkl", "byteorder"))] * 3)
    records[name] = _bytes(records[name], rng)
    packed, method = io.BytesIO(), 8 if rng.random() < 0.05 else 0
    with zipfile.ZipFile(packed, "w", method) as archive:
        for record, data in records.items():
            archive.writestr(record, data)
    return packed.getvalue()


_KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json,
    "bytes": _bytes,
    "header": _header,
    "safetensors": _safetensors,
    "torch": _torch,
}
