"""Whether the provider of a target can run a graph, by the kernels it is known to have.

For a target whose device is elsewhere this is what can be known before a session opens there. Nodes
in a layer must have a kernel: each one on the CPU would be two copies a layer. The few
outside, which work out positions and padding, may run on the CPU as ONNX Runtime likes.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import onnx
import onnx_ir as ir

from llama_onnx.exporter.graph.names import layer_of
from llama_onnx.runtime.placement.shares import HEAVY_OPERATORS
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.target import Target

_TYPES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.BOOL: "bool",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "uint8",
}


@dataclass(frozen=True)
class Kernel:
    """Registered for `operator` of `domain` from opset `since` on: each input's type parameter, and
    the types a parameter may be (one without an entry: any)."""

    operator: str
    domain: str
    since: int
    inputs: tuple[str, ...]
    types: Mapping[str, frozenset[str]]

    def refusal(self, node: ir.Node) -> str | None:
        """Return why the kernel does not accept `node`; None if it does."""
        bound: dict[str, str] = {}
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if index >= len(self.inputs):
                return f"input {index} is not read"
            parameter, dtype = self.inputs[index], value.dtype
            name = _TYPES.get(dtype, str(dtype)) if dtype is not None else "of unknown type"
            allowed = self.types.get(parameter)
            if allowed is not None and name not in allowed:
                return f"input {index} is {name}"
            if bound.setdefault(parameter, name) != name:
                return f"input {index} is {name}, where others are {bound[parameter]}"
        return None


@dataclass(frozen=True)
class Structure:
    """What was checked: `nodes` of the graph, of which `kernels` have one on `provider`; `on_cpu`
    are the others, small ones outside of the layers, by operator."""

    provider: str
    nodes: int
    kernels: int
    on_cpu: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one sentence."""
        text = f"{self.kernels} of {self.nodes} nodes have kernels on {self.provider}"
        small = ", ".join(f"{count} {op}" for op, count in self.on_cpu.items())
        return f"{text}, the others are small and outside of the layers ({small})"


def check_structure(model: ir.Model, target: Target) -> Structure | None:
    """Compare `model` with the kernels of `target`'s provider; None where there is no need to,
    because the graph was run on it or is made of ONNX's own operators.

    Raises `PackageError` naming the first node with weights, or inside of a layer, without one.
    """
    provider = target.session.provider.name
    if target.graph.operators.standard:
        check_standard(model)
        return None
    if not has_kernels(provider):
        return None
    known = read_kernels(provider)
    without: Counter[str] = Counter()
    for node in model.graph:
        why = _refusal(node, known, model.graph.opset_imports)
        if why is None:
            continue
        if layer_of(node.name or "") is not None or node.op_type in HEAVY_OPERATORS:
            raise PackageError(
                f"the graph cannot run on {provider}: {node.op_type} ({node.name}): {why}."
            )
        without[node.op_type] += 1
    nodes = sum(1 for _ in model.graph)
    return Structure(provider, nodes, nodes - without.total(), dict(without))


def check_standard(model: ir.Model) -> None:
    """Raise `PackageError` unless every node is of ONNX's own domain and its checker, with full
    shape inference, accepts the graph."""
    foreign = {node.op_type for node in model.graph if node.domain}
    if foreign:
        raise PackageError(f"the graph has operators that are not ONNX's: {', '.join(foreign)}.")
    try:
        proto = ir.to_proto(model)
        # The data file does not exist yet, and its content does not matter here.
        del proto.graph.initializer[:]
        proto.graph.input.extend(_as_inputs(model))
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise PackageError(f"ONNX's checker refuses the graph: {reason}") from error


def read_kernels(provider: str) -> dict[tuple[str, str], Kernel]:
    """The table of `provider` (see targets/kernels/README.md), by domain and operator."""
    text = _table(provider).read_text("utf-8")
    rows = (_kernel(row) for row in csv.DictReader(text.splitlines()))
    return {(kernel.domain, kernel.operator): kernel for kernel in rows}


def has_kernels(provider: str) -> bool:
    """Whether there is a table of `provider`: not of the CPU, where the graph is run instead."""
    return bool(_table(provider).is_file())


def _table(provider: str) -> Any:
    return files("llama_onnx.targets").joinpath("kernels", f"{provider}.csv")


def _kernel(row: Mapping[str, str]) -> Kernel:
    pairs = (entry.split("=") for entry in row["types"].split(";"))
    types = {parameter: frozenset(names.split()) for parameter, names in pairs}
    inputs = tuple(row["inputs"].split())
    return Kernel(row["operator"], row["domain"], int(row["since"]), inputs, types)


def _refusal(
    node: ir.Node, known: Mapping[tuple[str, str], Kernel], opsets: Mapping[str, int]
) -> str | None:
    kernel = known.get((node.domain, node.op_type))
    if kernel is None or opsets.get(node.domain, 0) < kernel.since:
        return "it has no kernel there"
    return kernel.refusal(node)


def _as_inputs(model: ir.Model) -> Iterable[onnx.ValueInfoProto]:
    """The initializers in the data file as inputs of the graph."""
    return (ir.to_proto(value) for value in model.graph.initializers.values())
