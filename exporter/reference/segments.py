"""Runs a package's graph one segment at a time: embedding, each decoder layer, head.

The segments are cut from the package's model.onnx and read its data file, so the package itself
runs, but only one layer's weights are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.graph.names import layer_of
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.reference.constants import made_of_weights
from llama_onnx.exporter.reference.exact import compute_in_float32
from llama_onnx.runtime import ort
from llama_onnx.runtime.measure.situations import Caches, Program
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.graph_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    is_past,
    is_present,
    past_of,
    present_of,
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Segment:
    """A part of the graph with the names of its inputs and outputs; `label` is for display."""

    label: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def segments(model: ir.Model, fed: Container[str] = ()) -> Iterator[Segment]:
    """Cut `model` into the part before the layers, each layer, and the part after them.

    `fed` are initializers to be replaced by fed values: they become inputs of the segments that
    read them. What is made of weights alone is no input or output of a segment: each has the nodes
    that make what it reads. Raises `PackageError` if a node comes before a node whose output it
    reads.
    """
    _check_order(model)
    groups: dict[int, list[ir.Node]] = {}
    current = -1
    for node in model.graph:
        layer = layer_of(node.name or "")
        if layer is not None:
            current = layer
        elif current >= 0:
            current = 1 << 30
        groups.setdefault(current, []).append(node)
    graph_outputs = set(model.graph.outputs)
    constant = made_of_weights(model.graph)
    for index, nodes in groups.items():
        members = set(nodes)
        made = {value for node in nodes for value in node.outputs}
        used = {value for node in nodes for value in node.inputs if value is not None}
        initializers = model.graph.initializers
        inputs = [
            value
            for value in used - made - constant
            if value.name not in initializers or value.name in fed
        ]
        outputs = [
            value
            for value in made - constant
            if value in graph_outputs or any(user not in members for user, _ in value.uses())
        ]
        label = "embedding" if index < 0 else "head" if index == 1 << 30 else f"layer {index}"
        yield Segment(label, tuple(nodes), _names(inputs), _names(outputs))


def moves_padding(model: ir.Model) -> bool:
    """Return whether the layers of `model` expect each row's valid positions first."""
    return any(node.op_type == "GroupQueryAttention" for node in model.graph)


def _check_order(model: ir.Model) -> None:
    # ONNX Runtime sorts nodes; the ONNX standard and the cutting above require them in order.
    seen: set[ir.Node] = set()
    for node in model.graph:
        for value in node.inputs:
            maker = value.producer() if value is not None else None
            if maker is not None and maker not in seen:
                raise PackageError(
                    f"the graph's nodes are out of order: {node.name} reads {maker.name}, which "
                    "comes later; export the package again."
                )
        seen.add(node)


def run_segments(
    path: Path,
    program: Program,
    config: LlamaConfig,
    *,
    exact: bool = False,
    adapter: Mapping[str, Array] | None = None,
) -> Iterator[tuple[str, Iterator[dict[str, Array]]]]:
    """Run `program` through each segment of the model at `path` in turn.

    Yields the label of each segment and an iterator over the outputs of every step of the program,
    by value name. Steps that the caller does not consume are run before the next segment. `exact`:
    compute in float32, even if the package computes in another type. `adapter` has the parameters
    of the active LoRA adapter by name; None for the base without an adapter.

    Raises `PackageError` if the graph's nodes are out of order, or if a layer reads the cache of
    another.
    """
    model = ir.load(path)
    if exact:
        compute_in_float32(model, config)
    environments: list[dict[str, Array]] = [
        {INPUT_IDS: step.ids, ATTENTION_MASK: step.mask, **(adapter or {})} for step in program
    ]
    cuts = list(segments(model, adapter or ()))
    for number, segment in enumerate(cuts, start=1):
        _check_cache(segment, path)
        session = open_segment(model, segment, path.parent, exact=exact)
        needed = {name for cut in cuts[number:] for name in cut.inputs}
        steps = _run_segment(session, segment, program, environments, needed, config)
        yield segment.label, steps
        for _ in steps:
            pass
        del session


def _check_cache(segment: Segment, path: Path) -> None:
    """Raise `PackageError` if `segment` reads keys or values that it does not write."""
    for name in segment.inputs:
        if is_past(name) and present_of(name) not in segment.outputs:
            raise PackageError(
                f"{path}: {segment.label} reads {name}, the cache of another layer: export the "
                "package again."
            )


def _run_segment(
    session: ort.Session,
    segment: Segment,
    program: Program,
    environments: list[dict[str, Array]],
    needed: Set[str],
    config: LlamaConfig,
) -> Iterator[dict[str, Array]]:
    """Yield the outputs of each step; `environments` keep the `needed` inputs of later segments."""
    caches = Caches(program)
    dtypes = {entry.name: entry.type for entry in session.get_inputs()}
    for index, (step, environment) in enumerate(zip(program, environments, strict=True)):
        shape = (len(step.ids), config.num_key_value_heads, 0, config.head_dim)
        past = caches.before(index) or {}
        feeds = {
            name: past.get(name, np.zeros(shape, ort.numpy_dtype(dtypes[name])))
            if is_past(name)
            else environment[name]
            for name in segment.inputs
        }
        with ort.running(f"in {segment.label}"):
            values = session.run(list(segment.outputs), feeds)
        outputs = dict(zip(segment.outputs, values, strict=True))
        caches.put(
            index,
            {past_of(name): value for name, value in outputs.items() if is_present(name)},
        )
        everything = environment | outputs
        environments[index] = {n: v for n, v in everything.items() if n in needed}
        yield outputs


def open_segment(
    model: ir.Model, segment: Segment, folder: Path, *, exact: bool = False
) -> ort.Session:
    """Open a session of `segment` of `model`, which reads its weights from the data file in
    `folder`. Set `exact` if `compute_in_float32` has changed `model`."""
    part = ir.convenience.extract(model.graph, list(segment.inputs), list(segment.outputs))
    proto = ir.to_proto(ir.Model(part, ir_version=model.ir_version))
    settings = ort.Settings(weights=folder, exact=exact)
    return ort.create_session(proto.SerializeToString(), settings=settings)


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(sorted(str(value.name) for value in values))
