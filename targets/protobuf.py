"""Protocol Buffers' wire format, read and written without a library; read strictly.

A package's graph must be checked before a library opens it, and by a runtime that does not have the
onnx library. Only what a sound file needs is accepted: no groups, no varint of more than 64 bits,
no field number above 2^29 - 1.
https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""The wire types."""

Value = int | memoryview
"""A varint, or the bytes of any other field."""


class WireError(ValueError):
    """What is wrong with the bytes."""


def fields(message: memoryview) -> Iterator[tuple[int, int, Value]]:
    """Yield number, wire type and value of each field of `message`, in their order.

    Raises `WireError`.

    >>> [(number, bytes(value)) for number, _, value in fields(memoryview(b"\\x0a\\x02hi"))]
    [(1, b'hi')]
    """
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise WireError(f"field number {number}")
        value: Value
        if kind == VARINT:
            value, position = _varint(message, position)
        else:
            start, position = _span(message, position, kind)
            value = message[start:position]
        yield number, kind, value


def encode(number: int, kind: int, value: int | bytes | memoryview) -> bytes:
    """Return a field as `fields` yields it, in the wire format.

    >>> encode(1, BYTES, b"hi")
    b'\\n\\x02hi'
    """
    tag = _encode_varint(number << 3 | kind)
    if isinstance(value, int):
        return tag + _encode_varint(value)
    length = _encode_varint(len(value)) if kind == BYTES else b""
    return tag + length + value


def encode_text(number: int, text: str) -> bytes:
    """Return a field with a text.

    >>> encode_text(1, "hi")
    b'\\n\\x02hi'
    """
    return encode(number, BYTES, text.encode())


def _encode_varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def varints(packed: memoryview) -> list[int]:
    """Return the varints of a packed field."""
    values, position = [], 0
    while position < len(packed):
        value, position = _varint(packed, position)
        values.append(value)
    return values


def signed(value: int) -> int:
    """Return a varint as the int64 that it stands for."""
    return value - (1 << 64) if value >> 63 else value


def _span(message: memoryview, position: int, kind: int) -> tuple[int, int]:
    """Return start and end of the bytes of a field of wire type `kind` at `position`."""
    if kind == BYTES:
        length, start = _varint(message, position)
    elif kind in (FIXED64, FIXED32):
        length, start = (8 if kind == FIXED64 else 4), position
    else:
        raise WireError(f"wire type {kind}")
    if start + length > len(message):
        raise WireError("a field longer than its message")
    return start, start + length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    if position < len(message) and message[position] < 0x80:  # as almost always
        return message[position], position + 1
    value = shift = 0
    while True:
        if position >= len(message):
            raise WireError("a cut number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise WireError("a number of more than 64 bits")
    if value >> 64:
        raise WireError("a number of more than 64 bits")
    return value, position
