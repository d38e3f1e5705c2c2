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

from collections.abc import Callable, Collection, Iterator, Mapping
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
from llama_onnx.targets.protobuf import BYTES, Value, encode, fields

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
    if not chosen:
        raise UnsupportedError(f"{package.path} has no matrix that int8 activations multiply.")
    with package.data_path.open("rb") as source, (folder / DATA_FILE).open("xb") as target:
        written = _Writer(graph, source, target)
        made: dict[int, list[bytes]] = {}
        read: set[str] = set()
        for done, (index, matrix) in enumerate(chosen.items()):
            made[index] = written.product(matrix, new=matrix.node.inputs[0] not in read)
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


def _integer_attributes(node: memoryview) -> Iterator[tuple[str, int]]:
    for number, _, value in fields(node):
        if number == 5 and isinstance(value, memoryview):  # AttributeProto: name = 1, i = 3
            found = {key: content for key, _, content in fields(value)}
            name, integer = found.get(1), found.get(3)
            if isinstance(name, memoryview) and isinstance(integer, int):
                yield bytes(name).decode(), integer


class _Writer:
    """Writes tensors to the new data file, and keeps their TensorProtos by name."""

    def __init__(self, graph: Graph, source: BinaryIO, target: BinaryIO) -> None:
        self._graph, self._source, self._target = graph, source, target
        self._places = {weights.name: weights for weights in graph.weights}
        self._made = {output: node for node in graph.nodes for output in node.outputs}
        self.protos: dict[str, bytes] = {}

    def product(self, matrix: _Matrix, *, new: bool) -> list[bytes]:
        """Write a matrix in int8 and return the nodes that multiply with it; `new`: its activations
        are not quantized yet."""
        codes, scales = self._quantized(matrix)
        entry, output = matrix.node.inputs[0], matrix.node.outputs[0]
        name = f"{_PREFIX}{output}"
        self._write(f"{name}.codes", _INT8, codes)
        self._write(f"{name}.scales", FLOAT, scales)
        inputs = (f"{_PREFIX}{entry}.codes", f"{name}.codes", f"{_PREFIX}one", f"{name}.scales")
        zeros = (f"{_PREFIX}middle", f"{_PREFIX}zero")
        return [
            *(_quantize(entry) if new else ()),
            onnx_wire.node(
                "MatMulIntegerToFloat", (*inputs, *zeros), f"{name}.sums", domain="com.microsoft"
            ),
            onnx_wire.node("Mul", (f"{name}.sums", f"{_PREFIX}{entry}.scales"), output),
        ]

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
        ("offset", FLOAT, np.float32(_MOST + 1)),
        ("most", FLOAT, np.float32(_MOST)),
        ("least", FLOAT, np.float32(1e-30)),
    ):
        found[_PREFIX + name] = onnx_wire.tensor(_PREFIX + name, kind, (), value.tobytes())
    last, minus_one = f"{_PREFIX}last", np.array([-1], np.int64)
    return {**found, last: onnx_wire.tensor(last, _INT64, (1,), minus_one.tobytes())}


def _quantize(entry: str) -> Iterator[bytes]:
    """Yield the nodes that make codes [.., K], uint8 with zero at 128, and scales [.., 1] of the
    activations `entry`."""
    name = _PREFIX + entry
    yield onnx_wire.node("Abs", (entry,), f"{name}.magnitudes")
    yield onnx_wire.node("ReduceMax", (f"{name}.magnitudes", f"{_PREFIX}last"), f"{name}.maxima")
    yield onnx_wire.node("Max", (f"{name}.maxima", f"{_PREFIX}least"), f"{name}.largest")
    yield onnx_wire.node("Div", (f"{name}.largest", f"{_PREFIX}most"), f"{name}.scales")
    yield onnx_wire.node("Div", (f"{_PREFIX}most", f"{name}.largest"), f"{name}.factors")
    yield onnx_wire.node("Mul", (entry, f"{name}.factors"), f"{name}.scaled")
    yield onnx_wire.node("Round", (f"{name}.scaled",), f"{name}.rounded")
    yield onnx_wire.node("Add", (f"{name}.rounded", f"{_PREFIX}offset"), f"{name}.shifted")
    yield onnx_wire.node("Cast", (f"{name}.shifted",), f"{name}.codes", {"to": UINT8})


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
