"""model.onnx of a stranger: only what our exporter writes, checked before any library opens it.

A graph is a program. This check leaves in it only the operators that a Llama needs, none of which
can loop, call another graph or make a large tensor out of a small file. Everything else is refused:
what a graph may be is a short list, what it must not be is not.
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

import re
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
from llama_onnx.targets.onnx_file import Graph, GraphError, Node, Shape, Weights, read_model
from llama_onnx.targets.protobuf import WireError

MAX_BYTES = 16 << 20
"""Largest graph: 126 layers of Llama 3.1 405B take 4 MB, with adapters."""

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
    for node in graph.nodes:
        if node.operator == "Range":
            for name in node.inputs:
                if not _is_small(name, graph.constants, made):
                    raise GraphError("has a Range whose length is not that of an input")


def _is_small(name: str, constants: Mapping[str, Sequence[int]], made: Mapping[str, Node]) -> bool:
    if name in constants:
        return all(abs(value) <= 1 for value in constants[name])
    squeeze = made.get(name)
    if squeeze is None or squeeze.operator != "Squeeze" or not squeeze.inputs:
        return False
    shape = made.get(squeeze.inputs[0])
    return shape is not None and shape.operator == "Shape"


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
        known = [dim for dim in shape if isinstance(dim, int)]
        if any(dim < 0 for dim in known) or prod(known) > _LARGEST_INPUT:
            raise GraphError(f"has an input or output of shape {list(shape)}, which is too large")
