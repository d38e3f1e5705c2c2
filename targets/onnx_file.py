"""The messages of a stranger's ONNX file, read without a library: no more than our exporter writes.

Fields, operators and types that it does not write are refused here; `graph_file` checks what the
parts are together.
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from llama_onnx.targets.graph_operators import OPERATORS
from llama_onnx.targets.protobuf import FIXED32, FIXED64, Value, WireError, fields, signed, varints

_BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 10: 16, 16: 16, 21: 4, 22: 4}
"""TensorProto.DataType -> bits; float, uint8, int8, int32, int64, float16, bfloat16, uint4, int4"""

FLOAT, UINT8, BFLOAT16 = 1, 2, 16
"""TensorProto.DataType of the weights that a graph may multiply."""

_INT64 = 7
_FLOAT, _INT, _STRING, _INTS = 1, 2, 3, 7
_ATTRIBUTE_TYPES = (_FLOAT, _INT, _STRING, _INTS)
_ATTRIBUTE_TEXTS = ("PER_CHANNEL",)  # of a cache in int8
_LARGEST_DIMENSION = 1 << 31
MOST_DIMENSIONS = 8
_LONGEST_TEXT = 1024
_LONGEST_PACKED = 10 * (MOST_DIMENSIONS + 1)  # bytes: what is cut off is one dimension too many

MAX_FIELDS = 300_000
"""Most fields of all messages: 126 layers of Llama 3.1 405B have 150,000, with adapters."""


Shape = tuple[int | str, ...]
"""The lengths of a tensor; a name stands for one that varies."""


class GraphError(ValueError):
    """What is wrong with a graph, to follow a file name: "has a Loop, ..."."""


@dataclass(frozen=True)
class Weights:
    """Where an initializer is in the data file."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Node:
    """A node: its operator, and the names of what it reads and makes."""

    operator: str
    domain: str
    inputs: Sequence[str]
    outputs: Sequence[str]


@dataclass
class Graph:
    """A graph as it is read: `constants` are the integers in it, `weights` are in the data file,
    and `tensors` has the type and the lengths of both by name."""

    nodes: Sequence[Node]
    tensors: dict[str, tuple[int, Sequence[int]]] = field(default_factory=dict)
    constants: dict[str, Sequence[int]] = field(default_factory=dict)
    weights: list[Weights] = field(default_factory=list)
    inputs: Mapping[str, Shape] = field(default_factory=dict)
    outputs: Mapping[str, Shape] = field(default_factory=dict)


# ---- the messages of onnx.proto ------------------------------------------------------------------


class _Fields:
    """The fields of one message: number -> values. Those in `once` may be there once, as of two
    libraries may take different ones; those in `many` any number of times; no others.

    `left` yields once for each field that the whole file may still have.
    """

    def __init__(
        self,
        message: Value,
        kind: str,
        left: Iterator[int],
        once: Sequence[int],
        many: Sequence[int] = (),
    ) -> None:
        if not isinstance(message, memoryview):
            raise WireError(f"a number instead of a {kind}")
        self._found: dict[int, list[Value]] = {}
        for number, wire, value in fields(message):
            if next(left, None) is None:
                raise GraphError(f"has more than {MAX_FIELDS:,} fields")
            if wire in (FIXED32, FIXED64) and kind != "attribute":
                # A library takes a text of this type for an unknown field, and does not see it.
                raise WireError(f"a number of fixed size in a {kind}")
            if number not in once and number not in many:
                raise GraphError(f"has field {number} of ONNX's {kind}, which no export writes")
            if number in once and number in self._found:
                raise GraphError(f"has field {number} of ONNX's {kind} twice")
            self._found.setdefault(number, []).append(value)

    def all(self, number: int) -> list[Value]:
        return self._found.get(number, [])

    def texts(self, number: int) -> list[str]:
        return [_text(value) for value in self.all(number)]

    def text(self, number: int) -> str:
        return next(iter(self.texts(number)), "")

    def number(self, number: int) -> int:
        value = next(iter(self.all(number)), 0)
        if not isinstance(value, int):
            raise WireError("bytes instead of a number")
        return value


def read_model(content: bytes, data_file: str) -> Graph:
    """Read the `content` of a file whose weights are in `data_file`.

    Raises `WireError` for what is not ONNX, `GraphError` for what the exporter does not write.
    """
    # Without 14, metadata_props: there ONNX Runtime looks for settings ("ort_config").
    left = iter(range(MAX_FIELDS))
    model = _Fields(memoryview(content), "model", left, once=(1, 2, 3, 4, 5, 6, 7), many=(8,))
    for message in model.all(8):
        domain = _Fields(message, "operator set", left, once=(1, 2)).text(1)
        if domain not in OPERATORS:
            raise GraphError(f"uses the operator set {domain!r}, which no export writes")
    if not model.all(7):
        raise WireError("there is no graph in it")
    read = _Fields(model.all(7)[0], "graph", left, once=(2, 10), many=(1, 5, 11, 12, 13, 16))
    graph = Graph([_read_node(message, left) for message in read.all(1)])
    for message in read.all(5):
        _read_tensor(message, graph, data_file, left)
    graph.inputs = _read_values(read.all(11), left)
    graph.outputs = _read_values(read.all(12), left)
    return graph


def _read_node(message: Value, left: Iterator[int]) -> Node:
    read = _Fields(message, "node", left, once=(3, 4, 6, 7), many=(1, 2, 5, 9))
    node = Node(read.text(4), read.text(7), read.texts(1), read.texts(2))
    read.text(3)  # its name, which messages of ONNX Runtime quote
    if node.operator not in OPERATORS.get(node.domain, ()):
        name = f"{node.domain}.{node.operator}" if node.domain else node.operator
        raise GraphError(f"has the operator {name!r}, which no export writes")
    for attribute in read.all(5):
        # Without 5 (a tensor), 6 (a graph) and lists of texts: no operator above has one.
        found = _Fields(attribute, "attribute", left, once=(1, 2, 3, 4, 13, 20), many=(7, 8))
        if found.number(20) not in _ATTRIBUTE_TYPES:
            raise GraphError("has an attribute of a type that no export writes")
        if any(text not in _ATTRIBUTE_TEXTS for text in found.texts(4)):
            raise GraphError("has an attribute with a text that no export writes")
    return node


def _read_tensor(message: Value, graph: Graph, data_file: str, left: Iterator[int]) -> None:
    read = _Fields(message, "tensor", left, once=(2, 8, 9, 12, 14), many=(1, 13, 16))
    name, kind, places = read.text(8), read.number(2), read.all(13)
    if name in graph.tensors:
        raise GraphError(f"has the weights {name!r} twice")
    dims = [dim for value in read.all(1) for dim in _integers(value)]
    graph.tensors[name] = kind, dims
    size = _tensor_bytes(name, dims, kind)
    if read.number(14) == 1:
        graph.weights.append(_read_place(name, size, places, data_file, left))
        return
    raw = next(iter(read.all(9)), memoryview(b""))
    if places or not isinstance(raw, memoryview) or len(raw) != size:
        raise GraphError(f"has the constant {name!r}, whose shape does not fit its bytes")
    if kind == _INT64:
        starts = range(0, len(raw), 8)
        graph.constants[name] = [
            int.from_bytes(raw[start : start + 8], "little", signed=True) for start in starts
        ]


def _tensor_bytes(name: str, dims: Sequence[int], kind: int) -> int:
    """Return the size of a tensor. It must be that of its bytes in the file: then no later step
    allocates what `dims` says and nobody has."""
    if kind not in _BITS:
        raise GraphError(f"has the weights {name!r} of a type that no export writes")
    if len(dims) > MOST_DIMENSIONS or not all(0 <= dim <= _LARGEST_DIMENSION for dim in dims):
        raise GraphError(f"has the weights {name!r} of a shape that no export writes")
    return (prod(dims) * _BITS[kind] + 7) // 8


def _read_place(
    name: str, size: int, places: Sequence[Value], data_file: str, left: Iterator[int]
) -> Weights:
    entries = [_Fields(message, "place", left, once=(1, 2)) for message in places]
    place = {entry.text(1): entry.text(2) for entry in entries}
    if len(place) < len(entries) or place.keys() != {"location", "offset", "length"}:
        raise GraphError(f"has the weights {name!r} without a plain place in {data_file}")
    if place["location"] != data_file:
        raise GraphError(f"reads the weights {name!r} from {place['location']!r}: not {data_file}")
    offset, length = (_digits(place[key]) for key in ("offset", "length"))
    if offset is None or length != size:
        raise GraphError(f"has the weights {name!r}, whose shape does not fit their bytes")
    return Weights(name, offset, offset + size)


def _digits(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _read_values(messages: Sequence[Value], left: Iterator[int]) -> dict[str, Shape]:
    """Return the names and shapes of inputs or outputs."""
    values: dict[str, Shape] = {}
    for message in messages:
        read = _Fields(message, "value", left, once=(1, 2, 3), many=(4,))
        name = read.text(1)
        if name in values:
            raise GraphError(f"has the input or output {name!r} twice")
        values[name] = tuple(_read_shape(read.all(2), left))
    return values


def _read_shape(types: Sequence[Value], left: Iterator[int]) -> Iterator[int | str]:
    # A type has a tensor's type, which has a shape, which has lengths; other types are refused.
    inner = [v for t in types for v in _Fields(t, "type", left, once=(1, 6)).all(1)]
    shapes = [v for t in inner for v in _Fields(t, "tensor's type", left, once=(1, 2)).all(2)]
    for length in (v for s in shapes for v in _Fields(s, "shape", left, once=(), many=(1,)).all(1)):
        read = _Fields(length, "length", left, once=(1, 2, 3))
        if len(read.all(1)) + len(read.all(2)) != 1:
            raise GraphError("has a length that is neither a number nor a name")
        yield read.text(2) if read.all(2) else signed(read.number(1))


def _text(value: Value) -> str:
    if not isinstance(value, memoryview):
        raise WireError("a number instead of a text")
    if len(value) > _LONGEST_TEXT:
        # A hundred thousand operators could name a tensor whose name is compared each time.
        raise GraphError(f"has a name or text of {len(value):,} bytes, which no export writes")
    try:
        text = str(value, "utf-8")
    except UnicodeDecodeError:
        raise WireError("a text that is not UTF-8") from None
    if not (text.isascii() and text.isprintable()):
        # ONNX Runtime prints the names of nodes that fail, and a terminal would obey them.
        raise GraphError("has a name or text beyond printable ASCII, which no export writes")
    return text


def _integers(value: Value) -> list[int]:
    if isinstance(value, int):
        return [signed(value)]
    return [signed(number) for number in varints(value[:_LONGEST_PACKED])]
