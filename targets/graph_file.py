"""model.onnx of a stranger: only what our exporter writes, checked before any library opens it.

A graph is a program. This check leaves in it only the operators that a Llama needs, none of which
can loop, call another graph or make a large tensor out of a small file. Everything else is refused:
what a graph may be is a short list, what it must not be is not.
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from llama_onnx.targets.graph_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    KEY,
    LOGITS,
    LORA_A,
    LORA_B,
    VALUE,
    is_past,
    past_name,
    present_name,
)
from llama_onnx.targets.onnx_file import (
    BFLOAT16,
    FLOAT,
    MOST_DIMENSIONS,
    UINT8,
    Graph,
    GraphError,
    Node,
    Shape,
    Weights,
    read_model,
)
from llama_onnx.targets.protobuf import WireError

MAX_BYTES = 16 << 20
"""Largest graph: 126 layers of Llama 3.1 405B take 4 MB, with adapters."""

FOLDED = ("Cast", "Cos", "DequantizeLinear", "Mul", "Sin", "Transpose")
"""Operators that may work on weights alone, in the forms that `_is_written` knows."""

LARGEST_TABLE = 1 << 24
"""Most values of a rotary table that the graph computes."""

_MOST_FOLDS = 4  # in a row
_MOST_READERS = 2  # of the same weights, that convert them
_MOST_JOINED = 8  # tensors
_LARGEST_INPUT = 1 << 24  # values at one position
_ADAPTER = re.compile(rf"model\.[\w.]+\.(?:{LORA_A}|{LORA_B})\.weight", re.ASCII)


@dataclass(frozen=True)
class GraphFacts:
    """What a graph says about itself.

    `inputs` and `outputs` map names to shapes, `weights` are in the order of the file.
    """

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    weights: tuple[Weights, ...]

    @property
    def layers(self) -> int:
        """The number of layers with a cache."""
        return sum(map(is_past, self.inputs)) // 2

    @property
    def vocab_size(self) -> int:
        """The number of logits at a position."""
        return int(self.outputs[LOGITS][-1])

    @property
    def cache(self) -> tuple[int, int]:
        """The number of key heads and their size."""
        shape = self.inputs[past_name(0, KEY)]
        return int(shape[1]), int(shape[3])


def check_graph(content: bytes, data_file: str, data_size: int) -> GraphFacts:
    """Return the facts of the graph in `content`, whose weights are in `data_file`.

    Raises `GraphError` for anything that the exporter does not write.
    """
    if len(content) > MAX_BYTES:
        raise GraphError(f"has {len(content):,} bytes, more than the {MAX_BYTES:,} allowed")
    if content[4:8] == b"ORTM":
        raise GraphError("is in ONNX Runtime's own format, which is not checked")
    try:
        graph = read_model(content, data_file)
    except WireError as error:
        raise GraphError(f"is not an ONNX model ({error})") from None
    _check_weights(graph.weights, data_file, data_size)
    _check_sizes(graph)
    _check_joins(graph)
    _check_constants(graph)
    _check_interface(graph)
    return GraphFacts(graph.inputs, graph.outputs, tuple(graph.weights))


def _check_weights(weights: list[Weights], data_file: str, data_size: int) -> None:
    """Raise `GraphError` unless the weights are in the data file, and take as much memory as it
    has: twice that, as a head that is tied to the embedding is there once and named twice."""
    for each in weights:
        if each.end > data_size:
            raise GraphError(
                f"has the weights {each.name!r} up to byte {each.end:,}, but {data_file} ends at "
                f"byte {data_size:,}"
            )
    if sum(each.end - each.start for each in weights) > 2 * data_size:
        raise GraphError(f"has weights that name the same bytes of {data_file} again and again")


def _check_sizes(graph: Graph) -> None:
    """Raise `GraphError` unless the length of each Range is that of a tensor: it is the one
    operator that makes a tensor of any size out of numbers."""
    made = {output: node for node in graph.nodes for output in node.outputs}
    ranges = (node for node in graph.nodes if node.operator == "Range")
    # Each name once: many nodes may read one large constant.
    for name in {name for node in ranges for name in node.inputs}:
        if not _is_small(name, graph.constants, made):
            raise GraphError("has a Range whose length is not that of an input")


def _check_joins(graph: Graph) -> None:
    """Raise `GraphError` unless each Concat joins a few products, as those of an adapter's parts:
    what it makes of its own output would double with each node."""
    products = {
        output
        for node in graph.nodes
        if node.operator in ("MatMul", "FusedMatMul")
        for output in node.outputs
    }
    for node in graph.nodes:
        if node.operator == "Concat":
            few = len(node.inputs) <= _MOST_JOINED and len(set(node.inputs)) == len(node.inputs)
            if not few or not products.issuperset(node.inputs):
                raise GraphError("has a Concat of something else than a few products")


def _is_small(name: str, constants: Mapping[str, Sequence[int]], made: Mapping[str, Node]) -> bool:
    if name in constants:
        return all(abs(value) <= 1 for value in constants[name])
    squeeze = made.get(name)
    if squeeze is None or squeeze.operator != "Squeeze" or not squeeze.inputs:
        return False
    shape = made.get(squeeze.inputs[0])
    return shape is not None and shape.operator == "Shape"


def _check_constants(graph: Graph) -> None:
    """Raise `GraphError` for a node that works on weights alone: ONNX Runtime computes it while it
    opens the graph, whatever memory that takes. A few operators that convert weights are allowed,
    each in the form in which the exporter writes it."""
    made = {output: node for node in graph.nodes for output in node.outputs}
    readers: Counter[str] = Counter()
    tables = 0
    for node in graph.nodes:
        folded = node.operator in FOLDED
        inputs = node.inputs[:1] if folded else [name for name in node.inputs if name]
        if not inputs or not all(_is_constant(name, graph, made) for name in inputs):
            continue
        if not folded or not _is_written(node, graph, made):
            raise GraphError("computes with weights alone, which no export writes")
        readers[inputs[0]] += 1
        tables += _is_table(node, graph)
        if readers[inputs[0]] > _MOST_READERS or tables > 1:
            raise GraphError("converts the same weights again and again")


def _is_constant(name: str, graph: Graph, made: Mapping[str, Node]) -> bool:
    """Whether `name` is weights, or made of them. Raises `GraphError` if that takes many steps."""
    for _ in range(_MOST_FOLDS + 1):
        if name in graph.tensors:
            return True
        node = made.get(name)
        if node is None or node.operator not in FOLDED or not node.inputs:
            return False
        name = node.inputs[0]
    raise GraphError("converts weights in many steps, which no export writes")


def _is_written(node: Node, graph: Graph, made: Mapping[str, Node]) -> bool:
    """Whether the exporter writes `node`, whose first input is constant.

    What converts a tensor makes no more of it. A product can: that of a column and a row has as
    many values as both lengths multiplied.
    """
    if node.operator in ("Cos", "Sin"):
        angles = made.get(node.inputs[0])
        return angles is not None and _is_table(angles, graph)
    if node.operator != "Mul":
        return True
    if len(node.inputs) != 2:
        return False
    table = made.get(node.inputs[0])
    if table is not None and table.operator in ("Cos", "Sin"):
        kind, dims = graph.tensors.get(node.inputs[1], (0, (0,)))
        return kind == FLOAT and len(dims) < 2 and prod(dims) == 1
    return _is_table(node, graph) or _are_scales(node, graph, made)


def _is_table(node: Node, graph: Graph) -> bool:
    """Whether `node` makes the angles of the rotary embedding: positions [n, 1] times
    frequencies [1, h]."""
    if node.operator != "Mul" or len(node.inputs) != 2:
        return False
    (kind, rows), (other, columns) = (graph.tensors.get(name, (0, ())) for name in node.inputs)
    return (
        kind == other == FLOAT
        and len(rows) == len(columns) == 2
        and rows[1] == columns[0] == 1
        and rows[0] * columns[1] <= LARGEST_TABLE
    )


def _are_scales(node: Node, graph: Graph, made: Mapping[str, Node]) -> bool:
    """Whether `node` multiplies numbers of blocks, uint8 [N, blocks], by factors of rows [N, 1]."""
    tensors = []
    for name in node.inputs:
        cast = made.get(name)
        if cast is None or cast.operator != "Cast" or not cast.inputs:
            return False
        tensors.append(graph.tensors.get(cast.inputs[0], (0, ())))
    (kind, blocks), (other, rows) = tensors
    return (
        (kind, other) == (UINT8, BFLOAT16)
        and len(blocks) == len(rows) == 2
        and (blocks[0], 1) == (rows[0], rows[1])
    )


def _check_interface(graph: Graph) -> None:
    """Raise `GraphError` unless inputs and outputs are those of a Llama, and no larger."""
    past = {n: s for n, s in graph.inputs.items() if n not in (INPUT_IDS, ATTENTION_MASK)}
    cache = {name: shape for name, shape in past.items() if not _ADAPTER.fullmatch(name)}
    layers = len(cache) // 2
    expected = {past_name(i, part) for i in range(layers) for part in (KEY, VALUE)}
    presents = {present_name(i, part) for i in range(layers) for part in (KEY, VALUE)}
    outputs = {**graph.outputs}
    logits = outputs.pop(LOGITS, ())
    if not layers or cache.keys() != expected or outputs.keys() != presents:
        raise GraphError("has other inputs or outputs than a Llama")
    if INPUT_IDS not in graph.inputs or ATTENTION_MASK not in graph.inputs:
        raise GraphError(f"has no {INPUT_IDS} or no {ATTENTION_MASK}")
    # [batch, heads, positions, size], and [batch, positions, vocabulary]
    sizes = {(len(shape), *shape[1::2]) for shape in cache.values()}
    if len(sizes) > 1 or not all(_is_length(size) for shape in sizes for size in shape):
        raise GraphError("has a cache whose layers differ, or whose size varies")
    if {shape[0] for shape in sizes} != {4} or len(logits) != 3 or not _is_length(logits[2]):
        raise GraphError("has a cache or logits of another shape than a Llama")
    _check_lengths([*graph.inputs.values(), *graph.outputs.values()])


def _is_length(dim: int | str) -> bool:
    return isinstance(dim, int) and dim > 0


def _check_lengths(shapes: Iterable[Shape]) -> None:
    for shape in shapes:
        if len(shape) > MOST_DIMENSIONS:
            raise GraphError(f"has an input or output with {len(shape):,} dimensions")
        known = [dim for dim in shape if isinstance(dim, int)]
        if any(dim < 0 for dim in known) or prod(known) > _LARGEST_INPUT:
            raise GraphError(f"has an input or output of shape {list(shape)}, which is too large")
