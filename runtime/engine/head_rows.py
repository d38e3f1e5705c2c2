"""Have a graph compute the logits of a run's last positions only.

The head is a fifth of a small model's work, and of a prompt only the last logits are read. The file
computes all of them, as onnxruntime-genai expects. The engine adds one node before the head, which
passes on the rows from the input `LOGITS_FROM` on: a row of a product does not depend on the
others, so the logits that are left are the same.
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from llama_onnx.runtime import ort
from llama_onnx.targets.graph_names import LOGITS
from llama_onnx.targets.protobuf import BYTES, VARINT, Value, WireError, encode, encode_text, fields

LOGITS_FROM = "logits_from"
"""The input [1], int64: the first position of a run whose logits are computed."""

_ROWS, _END, _AXIS = (f"{LOGITS_FROM}.{name}" for name in ("rows", "end", "axis"))

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # of GraphProto
_READS, _MAKES, _NAME, _OPERATOR = 1, 2, 3, 4  # of NodeProto
_TYPE, _TENSOR, _SHAPE, _DIM = 2, 1, 2, 1  # of ValueInfoProto, and further in
_INT64 = 7  # of TensorProto.DataType

_HEADS = ("MatMulNBits", "MatMul", "FusedMatMul")


AS_SEVERAL = 2
"""Positions of a prompt that get logits: a single row would be computed by another kernel."""


class _UnsuitableError(Exception):
    """The head cannot be given fewer rows."""


def choose_rows(model: bytes) -> bytes:
    """Return the ONNX file `model` with the input `LOGITS_FROM`, or as it is if that cannot be.

    It cannot be where the logits are not a product, as with an adapter for the head.
    """
    try:
        return _edit(memoryview(model), [_GRAPH], _add_input)
    except (WireError, _UnsuitableError):
        return model


def chooses_rows(session: ort.Session) -> bool:
    """Return whether an open graph has the input `LOGITS_FROM`."""
    return any(entry.name == LOGITS_FROM for entry in session.get_inputs())


def _edit(message: memoryview, path: Sequence[int], change: Callable[[memoryview], bytes]) -> bytes:
    """Return `message` with the submessages changed to which the field numbers `path` lead."""
    if not path:
        return change(message)
    parts = []
    for number, kind, value in fields(message):
        if number == path[0]:
            value = memoryview(_edit(_message(value), path[1:], change))
        parts.append(encode(number, kind, value))
    return b"".join(parts)


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise WireError("a number for a message")
    return value


def _add_input(graph: memoryview) -> bytes:
    """Return a graph with the new input, and a Slice before the node that makes the logits."""
    parts, heads = [], 0
    for number, kind, value in fields(graph):
        if number == _NODE and _makes_logits(node := _message(value)):
            if _texts(node, _OPERATOR)[0] not in _HEADS:
                raise _UnsuitableError
            heads += 1
            parts.append(encode(_NODE, BYTES, _slice(_texts(node, _READS)[0])))
            value = memoryview(_rename_first(node))
        elif number == _OUTPUT and LOGITS in _texts(_message(value), 1):
            value = memoryview(_free_rows(_message(value)))
        parts.append(encode(number, kind, value))
    if heads != 1:
        raise _UnsuitableError
    return b"".join((*parts, *_added()))


def _makes_logits(node: memoryview) -> bool:
    # Most nodes do not have the word in them, which is seen faster than it is parsed.
    return LOGITS.encode() in bytes(node) and LOGITS in _texts(node, _MAKES)


def _slice(hidden: str) -> bytes:
    """Return a NodeProto: the rows of `hidden` from `LOGITS_FROM` on."""
    inputs = (hidden, LOGITS_FROM, _END, _AXIS)
    return b"".join(
        (
            *(encode_text(_READS, name) for name in inputs),
            encode_text(_MAKES, _ROWS),
            encode_text(_NAME, _ROWS),
            encode_text(_OPERATOR, "Slice"),
        )
    )


def _rename_first(node: memoryview) -> bytes:
    """Return a node that reads the chosen rows instead of its first input."""
    parts, renamed = [], False
    for number, kind, value in fields(node):
        if number == _READS and not renamed:
            value, renamed = memoryview(_ROWS.encode()), True
        parts.append(encode(number, kind, value))
    return b"".join(parts)


def _free_rows(output: memoryview) -> bytes:
    """Return the ValueInfoProto of the logits with another name for the number of their rows."""

    def rename(shape: memoryview) -> bytes:
        batch, rows, width = (value for number, _, value in fields(shape) if number == _DIM)
        if any(number == 1 for number, *_ in fields(_message(rows))):  # a fixed length
            raise _UnsuitableError
        return b"".join(
            encode(_DIM, BYTES, _message(each))
            for each in (batch, memoryview(encode_text(2, _ROWS)), width)
        )

    return _edit(output, [_TYPE, _TENSOR, _SHAPE], rename)


def _added() -> Iterator[bytes]:
    """Yield the graph's new input and the Slice's constants."""
    shape = encode(_DIM, BYTES, encode(1, VARINT, 1))
    tensor = encode(1, VARINT, _INT64) + encode(_SHAPE, BYTES, shape)
    kind = encode(_TYPE, BYTES, encode(_TENSOR, BYTES, tensor))
    yield encode(_INPUT, BYTES, encode_text(1, LOGITS_FROM) + kind)
    for name, value in ((_END, (1 << 63) - 1), (_AXIS, 1)):
        # TensorProto: dims = 1, data_type = 2, name = 8, raw_data = 9
        head = encode(1, VARINT, 1) + encode(2, VARINT, _INT64) + encode_text(8, name)
        yield encode(_INITIALIZER, BYTES, head + encode(9, BYTES, value.to_bytes(8, "little")))


def _texts(message: memoryview, number: int) -> list[str]:
    """Return the texts of a repeated field."""
    return [
        bytes(_message(value)).decode("utf-8", "replace")
        for key, _, value in fields(message)
        if key == number
    ]
