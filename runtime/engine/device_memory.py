"""Caches in the memory of a device, moved there by a small graph that the device runs.

ONNX Runtime's Python API copies whole values only. A graph of a few nodes on the same provider does
the rest: it joins some positions of a row, others from elsewhere, and zeros, and writes the result
to where it is bound, for all layers in one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.cache_layout import Block, CacheLayout
from llama_onnx.runtime.engine.cache_memory import Array, DeviceView, Move
from llama_onnx.targets.protobuf import BYTES, VARINT, encode, encode_text
from llama_onnx.targets.provider import Provider

_TYPES: dict[type[np.generic], int] = {np.float32: 1, np.uint8: 2, np.int8: 3, np.float16: 10}
"""ONNX's numbers of the types that caches have."""

_INT64 = 7
_OPSET = 17
_ALIGNED = 256
"""Bytes at a multiple of which a part begins, as memory of CUDA does."""


class DeviceBuffers:
    """Rows of keys and values in one piece of a device's memory, moved by a `Joiner`."""

    def __init__(self, joiner: Joiner) -> None:
        self._joiner = joiner
        self._piece = _Piece(self._joiner, 0, 0)

    def views(self, first: int, end: int) -> dict[str, DeviceView]:
        """Return the rows from `first` to `end`."""
        return self._piece.views(first, end)

    def take(self, row: int, start: int, end: int) -> Block:
        """Return a copy of some positions of a row, in the memory of the process."""
        shapes = self._joiner.shapes(1, end - start)
        parts: dict[str, Array] = {name: np.empty(*shape) for name, shape in shapes.items()}
        self._joiner.join(self.views(row, row + 1), (start, end), {}, 0, parts)
        return {name: part[0] for name, part in parts.items()}

    def put(self, row: int, start: int, block: Block) -> None:
        """Write `block` to a row, from position `start` on; what was after it becomes zero."""
        target, length = self.views(row, row + 1), self._piece.length
        parts = {name: part[None] for name, part in block.items()}
        rest = length - start - next(iter(block.values())).shape[1]
        # A run cannot write to what it reads.
        joined = _Piece(self._joiner, 1, length).views(0, 1) if start else target
        self._joiner.join(target, (0, start), parts, rest, joined)
        if start:
            self._joiner.join(joined, (0, length), {}, 0, target)

    def swap(self, row: int, other: int, filled: int) -> None:
        """Exchange two rows."""
        length = self._piece.length
        first, second = (self.views(each, each + 1) for each in (row, other))
        kept = _Piece(self._joiner, 1, length).views(0, 1)
        for source, target in ((first, kept), (second, first), (kept, second)):
            self._joiner.join(source, (0, length), {}, 0, target)

    def resize(self, rows: int, length: int, moves: Sequence[Move]) -> None:
        """Become `rows` rows of `length` positions; the old ones are freed when all are moved."""
        piece = _Piece(self._joiner, rows, length)
        moved = {row: (other, filled) for row, other, filled in moves if filled}
        for row in range(rows):
            target = piece.views(row, row + 1)
            other, filled = moved.get(row, (None, 0))
            source = target if other is None else self.views(other, other + 1)
            self._joiner.join(source, (0, filled), {}, length - filled, target)
        self._piece = piece


class _Piece:
    """Memory of a device for all parts of some rows, one after the other."""

    def __init__(self, joiner: Joiner, rows: int, length: int) -> None:
        self.length, self._joiner = length, joiner
        self._starts: dict[str, int] = {}
        size = 0
        for name, (shape, kind) in joiner.shapes(rows, length).items():
            self._starts[name] = size
            size += -(-_bytes(shape, kind) // _ALIGNED) * _ALIGNED
        self._owner = joiner.allocate(size)

    def views(self, first: int, end: int) -> dict[str, DeviceView]:
        """Return the rows from `first` to `end` of each part."""
        found = {}
        for name, (shape, kind) in self._joiner.shapes(end - first, self.length).items():
            skipped = first * _bytes(shape[1:], kind)
            start = self._owner.data_ptr() + self._starts[name] + skipped
            found[name] = DeviceView(start, shape, kind, self._joiner.device, self._owner)
        return found


def _bytes(shape: tuple[int, ...], kind: type[np.generic]) -> int:
    return math.prod(shape) * np.dtype(kind).itemsize


class Joiner:
    """A graph that joins positions of all parts of a row, [1, kv_heads, positions, head_size]."""

    def __init__(self, layout: CacheLayout, provider: Provider) -> None:
        self.device, self._layout = provider.ort_device, layout
        kinds = [kind for _, _, kind in layout.parts.values()]
        self._session = ort.create_session(_graph(kinds), provider, ort.Settings(threads=1))

    def shapes(
        self, rows: int, positions: int
    ) -> dict[str, tuple[tuple[int, int, int, int], type[np.generic]]]:
        """Return the shape and the type of each part."""
        return {
            name: ((rows, *shape), kind)
            for name, (shape, kind) in self._layout.shapes(positions).items()
        }

    def allocate(self, size: int) -> Any:
        """Return `size` bytes on the device, whose contents are unknown.

        Raises `MemoryError` if there is not enough.
        """
        try:
            return ort.empty_on_device((max(1, size),), np.uint8, self.device)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise MemoryError(ort.first_line(error)) from None

    def join(
        self,
        source: Mapping[str, DeviceView],
        positions: tuple[int, int],
        parts: Block,
        zeros: int,
        target: Mapping[str, DeviceView | Array],
    ) -> None:
        """Write to `target` some `positions` of `source`, then `parts`, then so many `zeros`.

        `target` is another memory than `source`, or nothing is taken from `source`.
        """
        binding = self._session.io_binding()
        start, end = (np.array([each], np.int64) for each in positions)
        count = np.array([zeros], np.int64)
        for name, value in (("start", start), ("end", end), ("zeros", count)):
            binding.bind_cpu_input(name, value)
        kept = []
        for number, (name, (shape, kind)) in enumerate(self.shapes(1, 0).items()):
            source[name].bind(binding.bind_input, f"source.{number}")
            kept.append(np.ascontiguousarray(parts.get(name, np.empty(shape, kind))))
            binding.bind_cpu_input(f"part.{number}", kept[-1])
            _bind_output(binding, f"joined.{number}", target[name])
        with ort.running("while moving a cache on the device"):
            self._session.run_with_iobinding(binding)


def _bind_output(binding: Any, name: str, target: DeviceView | Array) -> None:
    if isinstance(target, DeviceView):
        target.bind(binding.bind_output, name)
    else:
        pointer = target.ctypes.data
        binding.bind_output(name, "cpu", 0, target.dtype.type, target.shape, pointer)


def _graph(kinds: Sequence[type[np.generic]]) -> bytes:
    """Return the ONNX file: joined = Concat(Slice(source), part, zeros) over the positions, for
    parts of the types `kinds`.

    The zeros have the shape of `part` but for their number. The fields are those of
    https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
    """
    nodes, values, results = [], [], []
    for number, dtype in enumerate(kinds):
        kind = _TYPES[dtype]
        source, part, joined, taken, shape, rest, head, tail = (
            f"{name}.{number}"
            for name in ("source", "part", "joined", "taken", "shape", "rest", "head", "tail")
        )
        one = encode(1, VARINT, 1) + encode(2, VARINT, kind)
        zero = one + encode(9, BYTES, bytes(np.dtype(dtype).itemsize))
        nodes += [
            _node("Slice", (source, "start", "end", "axis"), taken),
            _node("Shape", (part,), head, _number("end", 2)),
            _node("Shape", (part,), tail, _number("start", 3)),
            _node("Concat", (head, "zeros", tail), shape, _number("axis", 0)),
            _node("ConstantOfShape", (shape,), rest, _tensor("value", zero)),
            _node("Concat", (taken, part, rest), joined, _number("axis", 2)),
        ]
        values += [_value(source, kind, 4), _value(part, kind, 4)]
        results.append(_value(joined, kind, 4))
    axis = encode(1, VARINT, 1) + encode(2, VARINT, _INT64) + encode_text(8, "axis")
    values += [_value(name, _INT64, 1, 1) for name in ("start", "end", "zeros")]
    graph = b"".join(
        (
            *(encode(1, BYTES, node) for node in nodes),
            encode_text(2, "join"),
            encode(5, BYTES, axis + encode(9, BYTES, (2).to_bytes(8, "little"))),
            *(encode(11, BYTES, value) for value in values),
            *(encode(12, BYTES, value) for value in results),
        )
    )
    opset = encode(8, BYTES, encode_text(1, "") + encode(2, VARINT, _OPSET))
    return encode(1, VARINT, 8) + encode(7, BYTES, graph) + opset


def _node(operator: str, inputs: Sequence[str], output: str, attribute: bytes = b"") -> bytes:
    read = b"".join(encode_text(1, name) for name in inputs)
    return read + encode_text(2, output) + encode_text(4, operator) + attribute


def _number(name: str, value: int) -> bytes:
    """Return an attribute of a node, a whole number."""
    message = encode_text(1, name) + encode(3, VARINT, value) + encode(20, VARINT, 2)
    return encode(5, BYTES, message)


def _tensor(name: str, value: bytes) -> bytes:
    """Return an attribute of a node, a TensorProto."""
    return encode(5, BYTES, encode_text(1, name) + encode(5, BYTES, value) + encode(20, VARINT, 4))


def _value(name: str, kind: int, rank: int, length: int | None = None) -> bytes:
    """Return a ValueInfoProto, with free dimensions unless `length` is given."""
    sizes = [encode_text(2, f"{name}.{axis}") for axis in range(rank)]
    if length is not None:
        sizes = [encode(1, VARINT, length)]
    shape = b"".join(encode(1, BYTES, size) for size in sizes)
    tensor = encode(1, VARINT, kind) + encode(2, BYTES, shape)
    return encode_text(1, name) + encode(2, BYTES, encode(1, BYTES, tensor))
