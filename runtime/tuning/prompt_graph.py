"""Write a second graph of a package, which reads prompts: its matrices in int8, one scale a row.

ONNX Runtime's MatMulNBits is made for one row of activations. With many, a product of int8 with one
scale for each row of either side is several times as fast where the processor multiplies int8, but
takes one byte for each weight. So prompts are read with this graph, and answers with the package's.

For a matrix W [N, K] and activations x [S, K], with 127 for the largest of each row:

    y[s, n] = a[s] w[n] sum over k of round(x[s, k] / a[s]) round(W[n, k] / w[n])

a[s] = max |x[s]| / 127 (Dettmers et al., 2022, arXiv:2208.07339, "vector-wise quantization"),
w[n] = max |W[n]| / 127. The product is that of `com.microsoft.MatMulIntegerToFloat`:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.measure.block_codes import Float32, dequantize
from llama_onnx.runtime.tuning import onnx_wire
from llama_onnx.targets.errors import PackageError, UnsupportedError
from llama_onnx.targets.graph_names import LOGITS
from llama_onnx.targets.onnx_file import BFLOAT16, FLOAT, UINT8, Graph, Node, read_model
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.protobuf import BYTES, Value, encode, fields, signed

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER = 1, 5  # of GraphProto
_INT8, _INT64, _FLOAT16 = 3, 7, 10  # TensorProto.DataType
_PREFIX = "prompts/"  # of all names that are new
_ALIGNED = 64  # bytes
_CHUNK = 1 << 22  # values of a matrix at a time
_COPIED = 1 << 24  # bytes at a time
_MOST = 127

_COPIES: Mapping[int, tuple[type[np.generic], Callable[[npt.NDArray[np.generic]], Float32]]] = {
    FLOAT: (np.float32, lambda values: values.astype(np.float32)),
    _FLOAT16: (np.float16, lambda values: values.astype(np.float32)),
    BFLOAT16: (np.uint16, lambda values: (values.astype(np.uint32) << 16).view(np.float32)),
    UINT8: (np.uint8, lambda values: values.astype(np.float32)),
}
"""TensorProto.DataType -> how its numbers are stored, and what makes float32 of them."""


@dataclass(frozen=True)
class _Matrix:
    """A MatMulNBits and its attributes: `rows` are its outputs, `columns` its inputs."""

    node: Node
    rows: int
    columns: int
    bits: int
    block_size: int


def write_prompt_graph(
    package: ModelPackage, folder: Path, apart: Collection[str] = (), progress: Progress = SILENT
) -> int:
    """Write model.onnx and model.onnx.data to `folder`, and return how many matrices are in int8.

    All matrices of the layers are, but those whose node's name has a word of `apart` in it, and
    those that compute in float32. Needs the memory of a few matrices. Raises `UnsupportedError` if
    there is none, and `OSError` if a file cannot be written.
    """
    content = package.model_path.read_bytes()
    graph = read_model(content, DATA_FILE)
    model = list(fields(memoryview(content)))
    parts = [part for number, _, part in model if number == _GRAPH]
    (message,) = (part for part in parts if isinstance(part, memoryview))
    nodes = _raw_nodes(message)
    found = {
        index: m for index, node in enumerate(graph.nodes) if (m := _matrix(node, nodes[index]))
    }
    chosen = {i: m for i, m in found.items() if not any(w in m.node.outputs[0] for w in apart)}
    splits = _splits(graph, nodes)
    if not chosen:
        raise UnsupportedError(f"{package.path} has no matrix that int8 activations multiply.")
    with package.data_path.open("rb") as source, (folder / DATA_FILE).open("xb") as target:
        written = _Writer(graph, source, target)
        made: dict[int, list[bytes]] = {}
        read: set[str] = set()
        for done, (index, matrix) in enumerate(chosen.items()):
            outputs: Sequence[str] = matrix.node.outputs
            if outputs[0] in splits:
                split = splits[outputs[0]]
                outputs, made[split] = graph.nodes[split].outputs, []
            made[index] = written.products(matrix, outputs, new=matrix.node.inputs[0] not in read)
            read.add(matrix.node.inputs[0])
            progress.update("matrices", done + 1, len(chosen))
        written.protos.update(_constants())
        graph_bytes = b"".join(_rebuilt(message, graph, made, written))
    model_bytes = b"".join(
        encode(number, kind, graph_bytes if number == _GRAPH else value)
        for number, kind, value in model
    )
    (folder / MODEL_FILE).write_bytes(model_bytes)
    return len(chosen)


def _raw_nodes(message: memoryview) -> list[memoryview]:
    values = (value for number, _, value in fields(message) if number == _NODE)
    return [value for value in values if isinstance(value, memoryview)]


def _matrix(node: Node, raw: memoryview) -> _Matrix | None:
    """Return the matrix of a node that computes in int8 already; None for others, and the head,
    which computes few rows of a prompt."""
    if node.operator != "MatMulNBits" or LOGITS in node.outputs or any(node.inputs[4:]):
        return None
    numbers = dict(_integer_attributes(raw))
    if numbers.get("accuracy_level") != 4:
        return None
    sizes = (numbers[key] for key in ("N", "K", "bits", "block_size"))
    return _Matrix(node, *sizes)


def _splits(graph: Graph, nodes: Sequence[memoryview]) -> dict[str, int]:
    """Return the values that only a Split into equal parts of the last axis reads, and the index of
    that node. A matrix whose product is split is written as several, which saves a copy."""
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    found = {}
    for index, node in enumerate(graph.nodes):
        if node.operator == "Split" and len(node.inputs) == 1 and readers[node.inputs[0]] == 1:
            attributes = dict(_integer_attributes(nodes[index]))
            if attributes.get("axis") == -1:
                found[node.inputs[0]] = index
    return found


def _integer_attributes(node: memoryview) -> Iterator[tuple[str, int]]:
    for number, _, value in fields(node):
        if number == 5 and isinstance(value, memoryview):  # AttributeProto: name = 1, i = 3
            found = {key: content for key, _, content in fields(value)}
            name, integer = found.get(1), found.get(3)
            if isinstance(name, memoryview) and isinstance(integer, int):
                yield bytes(name).decode(), signed(integer)


class _Writer:
    """Writes tensors to the new data file, and keeps their TensorProtos by name."""

    def __init__(self, graph: Graph, source: BinaryIO, target: BinaryIO) -> None:
        self._graph, self._source, self._target = graph, source, target
        self._places = {weights.name: weights for weights in graph.weights}
        self._made = {output: node for node in graph.nodes for output in node.outputs}
        self.protos: dict[str, bytes] = {}

    def products(self, matrix: _Matrix, outputs: Sequence[str], *, new: bool) -> list[bytes]:
        """Write a matrix in int8 and return the nodes that multiply with it, of which each of
        `outputs` gets an equal part; `new`: its activations are not quantized yet."""
        codes, scales = self._quantized(matrix)
        entry = f"{_PREFIX}{matrix.node.inputs[0]}"
        zeros = (f"{_PREFIX}middle", f"{_PREFIX}zero")
        nodes = list(_quantize(matrix.node.inputs[0])) if new else []
        parts = (np.split(each, len(outputs), axis=-1) for each in (codes, scales))
        for output, part, steps in zip(outputs, *parts, strict=True):
            name = f"{_PREFIX}{output}"
            self._write(f"{name}.codes", _INT8, np.ascontiguousarray(part))
            self._write(f"{name}.scales", FLOAT, steps)
            inputs = (f"{entry}.codes", f"{name}.codes", f"{_PREFIX}one", f"{name}.scales", *zeros)
            sums = f"{name}.sums"
            nodes += [
                onnx_wire.node("MatMulIntegerToFloat", inputs, sums, domain="com.microsoft"),
                onnx_wire.node("Mul", (sums, f"{entry}.scales"), output),
            ]
        return nodes

    def copy(self, name: str) -> bytes:
        """Return the TensorProto of weights that stay as they are, and write them."""
        kind, dims = self._graph.tensors[name]
        place = self._places[name]
        start = self._start()
        self._source.seek(place.start)
        left = place.end - place.start
        while left:
            piece = self._source.read(min(left, _COPIED))
            if not piece:
                raise PackageError(f"{DATA_FILE} ends before the weights {name!r}.")
            self._target.write(piece)
            left -= len(piece)
        return onnx_wire.external_tensor(
            name, kind, dims, DATA_FILE, start, place.end - place.start
        )

    def is_external(self, name: str) -> bool:
        """Return whether a tensor is in the data file."""
        return name in self._places

    def _write(self, name: str, kind: int, values: npt.NDArray[np.generic]) -> None:
        start = self._start()
        self._target.write(values.data.cast("B"))
        self.protos[name] = onnx_wire.external_tensor(
            name, kind, values.shape, DATA_FILE, start, values.nbytes
        )

    def _start(self) -> int:
        position = self._target.tell()
        self._target.write(bytes(-position % _ALIGNED))
        return self._target.tell()

    def _quantized(self, matrix: _Matrix) -> tuple[npt.NDArray[np.int8], Float32]:
        """Return codes [K, N] and scales [N] of a matrix."""
        rows, columns = matrix.rows, matrix.columns
        blocks = -(-columns // matrix.block_size)
        _, codes, scales, *zeros = matrix.node.inputs
        packed = self._raw(codes).reshape(rows, -1)
        factors = self._value(scales).reshape(rows, blocks)
        points = self._raw(zeros[0]).reshape(rows, -1) if zeros and zeros[0] else None
        found, largest = np.empty((columns, rows), np.int8), np.empty(rows, np.float32)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            values = dequantize(
                packed[part],
                factors[part],
                matrix.bits,
                matrix.block_size,
                columns,
                None if points is None else points[part],
            )
            scale = np.abs(values).max(axis=1) / np.float32(_MOST)
            scale[scale == 0] = 1
            largest[part] = scale
            found[:, part] = np.rint(values / scale[:, None]).astype(np.int8).T
        return found, largest

    def _value(self, name: str) -> Float32:
        """Return weights as float32, or what a Cast or Mul makes of them."""
        node = self._made.get(name)
        if node is None:
            stored, convert = _COPIES[self._graph.tensors[name][0]]
            return convert(self._raw(name).view(stored)).reshape(self._graph.tensors[name][1])
        if node.operator not in ("Cast", "Mul"):
            raise UnsupportedError(f"the scales {name!r} are made by a {node.operator}.")
        first, *others = (self._value(each) for each in node.inputs)
        return first * others[0] if others else first

    def _raw(self, name: str) -> npt.NDArray[np.uint8]:
        place = self._places.get(name)
        if place is None:
            raise UnsupportedError(f"the weights {name!r} are not in {DATA_FILE}.")
        self._source.seek(place.start)
        return np.frombuffer(self._source.read(place.end - place.start), np.uint8)


def _constants() -> dict[str, bytes]:
    """Return what all products share, by name."""
    found = {}
    for name, kind, value in (
        ("one", FLOAT, np.float32(1)),
        ("zero", _INT8, np.int8(0)),
        ("middle", UINT8, np.uint8(_MOST + 1)),
        ("most", FLOAT, np.float32(_MOST)),
        ("least", FLOAT, np.float32(1e-30)),
        ("last", _INT64, np.array([-1])),
        ("flat", _INT64, np.array([-1])),
    ):
        dims = np.shape(value)
        found[_PREFIX + name] = onnx_wire.tensor(_PREFIX + name, kind, dims, value.tobytes())
    return found


def _quantize(entry: str) -> Iterator[bytes]:
    """Yield the nodes that make codes [.., K], uint8 with zero at 128, and scales [.., 1] of the
    activations `entry`.

    QuantizeLinear takes a scale for each index of one axis, so it gets the activations as rows.
    """
    name = _PREFIX + entry
    yield onnx_wire.node("ReduceMax", (entry, f"{_PREFIX}last"), f"{name}.highest")
    yield onnx_wire.node("ReduceMin", (entry, f"{_PREFIX}last"), f"{name}.lowest")
    yield onnx_wire.node("Neg", (f"{name}.lowest",), f"{name}.depth")
    largest = (f"{name}.highest", f"{name}.depth", f"{_PREFIX}least")
    yield onnx_wire.node("Max", largest, f"{name}.largest")
    yield onnx_wire.node("Div", (f"{name}.largest", f"{_PREFIX}most"), f"{name}.scales")
    yield onnx_wire.node("Reshape", (f"{name}.scales", f"{_PREFIX}flat"), f"{name}.steps")
    yield onnx_wire.node("Shape", (f"{name}.steps",), f"{name}.count")
    yield onnx_wire.node("Expand", (f"{_PREFIX}middle", f"{name}.count"), f"{name}.zeros")
    yield onnx_wire.node("Shape", (entry,), f"{name}.shape")
    yield onnx_wire.node("Concat", (f"{name}.count", f"{_PREFIX}flat"), f"{name}.flat", {"axis": 0})
    yield onnx_wire.node("Reshape", (entry, f"{name}.flat"), f"{name}.rows")
    inputs = (f"{name}.rows", f"{name}.steps", f"{name}.zeros")
    yield onnx_wire.node("QuantizeLinear", inputs, f"{name}.rounded", {"axis": 0})
    yield onnx_wire.node("Reshape", (f"{name}.rounded", f"{name}.shape"), f"{name}.codes")


def _rebuilt(
    message: memoryview, graph: Graph, made: Mapping[int, list[bytes]], written: _Writer
) -> Iterator[bytes]:
    """Yield the fields of the graph with the nodes in `made` instead of others, and without what
    nothing reads any more."""
    needed = _needed(graph, made)
    index = -1
    for number, kind, value in fields(message):
        if number == _NODE:
            index += 1
            if index in made:
                yield from (encode(_NODE, BYTES, node) for node in made[index])
            elif needed.intersection(graph.nodes[index].outputs):
                yield encode(number, kind, value)
        elif number == _INITIALIZER:
            name = _name(value)
            if name in needed and written.is_external(name):
                yield encode(_INITIALIZER, BYTES, written.copy(name))
            elif name in needed:
                yield encode(number, kind, value)
        else:
            yield encode(number, kind, value)
    yield from (encode(_INITIALIZER, BYTES, proto) for proto in written.protos.values())


def _needed(graph: Graph, made: Collection[int]) -> set[str]:
    """Return the values that the outputs need: of a node in `made`, only the activations."""
    needed = set(graph.outputs)
    for index in reversed(range(len(graph.nodes))):
        node = graph.nodes[index]
        if needed.intersection(node.outputs):
            needed.update(node.inputs[:1] if index in made else node.inputs)
    return needed


def _name(tensor: Value) -> str:
    assert isinstance(tensor, memoryview)
    (name,) = (value for number, _, value in fields(tensor) if number == 8)
    assert isinstance(name, memoryview)
    return bytes(name).decode()
