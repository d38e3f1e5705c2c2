"""Graphs that are changed at random, field by field, so that most are still ONNX."""

from __future__ import annotations

from random import Random
from typing import Any

from llama_onnx.targets.protobuf import BYTES, FIXED32, FIXED64, VARINT, fields

Field = list[Any]
"""Number, wire type, and the value: a number, bytes, or the fields of a message."""

_ENTRY: dict[int, Any] = {}
_VALUE: dict[int, Any] = {2: {1: {2: {1: {}}}}}  # type, tensor's type, shape, length
_MODEL: dict[int, Any] = {7: {1: {5: {}}, 5: {13: _ENTRY}, 11: _VALUE, 12: _VALUE}, 8: {}}
"""Which fields are messages, and which of theirs."""

_NUMBERS = (0, 1, 2, 3, 6, 7, 9, 16, 22, 64, 1 << 24, 1 << 31, (1 << 31) + 1, 1 << 32, 1 << 63)
_TEXTS = (
    *(b"", b"Range", b"Squeeze", b"Shape", b"Loop", b"Add", b"com.microsoft", b"evil", b"\xff"),
    *(b"Cast", b"Mul", b"Cos", b"Transpose", b"model.positions.weight", b"lm_head.scales"),
    *(b"0", b"4096", b"-1", b"999999999999999999", b"1000000000000000000", b"0x10", b"01"),
    *(b"location", b"offset", b"length", b"model.onnx.data", b"../model.onnx.data"),
    *(b"input_ids", b"attention_mask", b"logits", b"past_key_values.1.key", b"present.00.key"),
    *(b"model.x.lora_A.weight", b"model..lora_A.weight", b"past_key_values.0.key.x", b"\0"),
)


def parse(message: memoryview, kinds: dict[int, Any]) -> list[Field]:
    return [
        [
            number,
            wire,
            value
            if isinstance(value, int)
            else parse(value, kinds[number])
            if number in kinds
            else bytes(value),
        ]
        for number, wire, value in fields(message)
    ]


def varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def serialize(message: list[Field]) -> bytes:
    out = bytearray()
    for number, wire, value in message:
        out += varint(number << 3 | wire)
        if wire == VARINT:
            out += varint(value)
        else:
            content = serialize(value) if isinstance(value, list) else value
            out += (varint(len(content)) if wire == BYTES else b"") + content
    return bytes(out)


def _pick(message: list[Field], random: Random) -> tuple[list[Field], int]:
    """Return a message, of any depth, and the place of a field in it."""
    while True:
        place = random.randrange(len(message))
        inner = message[place][2]
        if not isinstance(inner, list) or not inner or random.random() < 0.15:
            return message, place
        message = inner


def _change(model: list[Field], random: Random) -> None:
    message, place = _pick(model, random)
    entry = message[place]
    other, from_place = _pick(model, random)
    what = random.randrange(9)
    if what == 0:
        del message[place]
    elif what == 1:
        message.insert(random.randrange(len(message) + 1), list(entry))
    elif what == 2:
        entry[0] = random.choice([*range(1, 27), 31, 32, 33, 1 << 28, 0])
    elif what == 3:
        entry[1:] = random.choice(
            [[VARINT, 1], [BYTES, b""], [FIXED32, b"1234"], [FIXED64, b"12345678"], [3, b""]]
        )
    elif what == 4:
        message.insert(place, [random.randrange(1, 22), VARINT, random.choice(_NUMBERS)])
    elif what == 5:
        wire, value = other[from_place][1:]
        message[place] = [entry[0], wire, serialize(value) if isinstance(value, list) else value]
    elif what == 6:
        message.insert(place, [random.randrange(1, 22), BYTES, random.choice(_TEXTS)])
    elif entry[1] == VARINT:
        entry[2] = random.choice(_NUMBERS)
    elif isinstance(entry[2], bytes):
        entry[2] = random.choice([*_TEXTS, entry[2][:-1], entry[2] + b"\1", entry[2] * 2])
    else:
        random.shuffle(entry[2])


def changed(content: bytes, random: Random) -> bytes:
    """Return the graph in `content` with one or two changes, now and then with other bytes."""
    model = parse(memoryview(content), _MODEL)
    for _ in range(random.choice([1, 1, 2])):
        if model:
            _change(model, random)
    out = bytearray(serialize(model))
    if out and random.random() < 0.1:
        out[random.randrange(len(out))] = random.randrange(256)
    return bytes(out)
