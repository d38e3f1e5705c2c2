"""Checks whether a target's provider can run a graph, from a table of the provider's kernels.

If the device is not in this machine, nothing more can be checked before a session is opened there.
Every node in a layer must have a kernel: each one on the CPU would cost two copies per layer. The
few nodes outside the layers, which compute positions and padding, may run on the CPU.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import onnx
import onnx.defs
import onnx_ir as ir

from llama_onnx.exporter.graph.kernel_conditions import CONDITIONS
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
    """A kernel of a provider, for the `versions` of an operator of `domain`.

    `inputs` has the type parameter of each input; `types` has the types that a parameter allows (a
    parameter without an entry allows any). `outputs` are the numbers of those it can write, empty
    for all; `attributes` has the values that it computes with, of attributes that matter."""

    operator: str
    domain: str
    versions: tuple[str, ...]
    inputs: tuple[str, ...]
    types: Mapping[str, frozenset[str]]
    outputs: frozenset[int]
    attributes: Mapping[str, frozenset[str]]

    def refusal(self, node: ir.Node, opset: int) -> str | None:
        """Return why the kernel does not run `node` of a graph with `opset`; None if it does."""
        return (
            self._refused_version(opset)
            or self._refused_input(node)
            or self._refused_output(node)
            or self._refused_attribute(node)
        )

    def _refused_version(self, opset: int) -> str | None:
        version = _version(self.domain, self.operator, opset)
        for known in self.versions:
            if version == int(known.rstrip("+")) or (
                known.endswith("+") and version > int(known.rstrip("+"))
            ):
                return None
        return f"it has a kernel for version {' and '.join(self.versions)}, not for {version}"

    def _refused_input(self, node: ir.Node) -> str | None:
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
                return (
                    f"input {index} is {name}, but other inputs of its type are {bound[parameter]}"
                )
        return None

    def _refused_output(self, node: ir.Node) -> str | None:
        for index, value in enumerate(node.outputs):
            if value.name and self.outputs and index not in self.outputs:
                return f"output {index} is not written"
        return None

    def _refused_attribute(self, node: ir.Node) -> str | None:
        for name, allowed in self.attributes.items():
            if name in node.attributes and f"{node.attributes[name].value:g}" not in allowed:
                return f"{name} is {node.attributes[name].value:g}"
        return None


@dataclass(frozen=True)
class Structure:
    """The result of a check: `kernels` of the graph's `nodes` have a kernel on `provider`.

    `on_cpu` counts the others by operator; they are small and outside the layers."""

    provider: str
    nodes: int
    kernels: int
    on_cpu: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return its JSON form for the manifest."""
        return asdict(self)

    def __str__(self) -> str:
        """Return it as one line of text."""
        if not self.on_cpu:
            return f"all {self.nodes} nodes have kernels on {self.provider}"
        text = f"{self.kernels} of {self.nodes} nodes have kernels on {self.provider}"
        small = ", ".join(f"{count} {op}" for op, count in self.on_cpu.items())
        return (
            f"{text}; the others are small and outside the layers, and keep the graph from being "
            f"captured ({small})"
        )


def check_structure(model: ir.Model, target: Target) -> Structure | None:
    """Compare `model` with the kernels of `target`'s provider.

    Returns None if no comparison is needed: the graph consists of standard ONNX operators, or there
    is no table because the graph is run on the provider instead. Raises `PackageError` that names
    the first node without a kernel that is in a layer or reads weights.
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
        condition = CONDITIONS.get((provider, node.op_type))
        if why is None and condition is not None:
            why = condition(node)
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
    """Raise `PackageError` unless all operators are in ONNX's own domain and the ONNX checker, with
    full shape inference, accepts the graph."""
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
    """Return the kernels of `provider` by (domain, operator); see targets/kernels/README.md."""
    text = _table(provider).read_text("utf-8")
    rows = (_kernel(row) for row in csv.DictReader(text.splitlines()))
    return {(kernel.domain, kernel.operator): kernel for kernel in rows}


def has_kernels(provider: str) -> bool:
    """Return whether there is a table for `provider`. The CPU has none: the graph is run there."""
    return bool(_table(provider).is_file())


def _table(provider: str) -> Any:
    return files("llama_onnx.targets").joinpath("kernels", f"{provider}.csv")


def _kernel(row: Mapping[str, str]) -> Kernel:
    return Kernel(
        row["operator"],
        row["domain"],
        tuple(row["versions"].split()),
        tuple(row["inputs"].split()),
        _lists(row["types"]),
        frozenset(map(int, row["outputs"].split())),
        _lists(row["attributes"]),
    )


def _lists(text: str) -> dict[str, frozenset[str]]:
    """Return `{"T": {"fp32", "fp16"}}` for `T=fp32 fp16`; entries are separated by semicolons."""
    pairs = (entry.split("=") for entry in text.split(";") if entry)
    return {name: frozenset(values.split()) for name, values in pairs}


def _refusal(
    node: ir.Node, known: Mapping[tuple[str, str], Kernel], opsets: Mapping[str, int]
) -> str | None:
    kernel = known.get((node.domain, node.op_type))
    if kernel is None:
        return "it has no kernel there"
    return kernel.refusal(node, opsets.get(node.domain, 0))


def _version(domain: str, operator: str, opset: int) -> int:
    """Return the version of `operator` in `opset`: that of its last change. ONNX Runtime takes a
    kernel for exactly that version, unless the kernel says up to which one it is right."""
    if onnx.defs.has(operator, domain=domain):
        return int(onnx.defs.get_schema(operator, opset, domain).since_version)
    return 1  # ONNX Runtime's own operators, one of which is in ONNX's domain


def _as_inputs(model: ir.Model) -> Iterable[onnx.ValueInfoProto]:
    """Return the initializers in the data file as graph inputs."""
    return (ir.to_proto(value) for value in model.graph.initializers.values())
