"""The cost of each node of the graph: the weight bytes it reads and its multiply-accumulates.

The runtime has no library that reads a graph. With this table, which is in the manifest, it reports
the share of the weights and of the work that runs on each provider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from llama_onnx.exporter.graph.model import BuiltModel

CONTEXT = 1024
"""Cached positions assumed for attention, the only part whose work grows with them."""

_PREPARATIONS = {"Cast", "DequantizeLinear", "Mul", "Transpose"}
_PRODUCTS = {"MatMulNBits", "FusedMatMul", "MatMul", "Gemm"}


def graph_costs(built: BuiltModel) -> dict[str, Any]:
    """Return the "graph" entry of the manifest: the number of nodes, and the costs of those that
    read weights or multiply.

    `costs` maps a node's name to its operator, the `weight_bytes` it reads and its
    `macs_per_token`: multiply-accumulates for one new token after `context` cached ones. Rotary
    tables do not count as weights. A matrix that two nodes read, such as a tied embedding, counts
    for both.
    """
    weights = _weights(built)
    costs = {}
    for node in built.ir.graph:
        read = [weights[name] for name in _initializers(node) if name in weights]
        cost = {
            "op": node.op_type,
            "weight_bytes": sum(nbytes for nbytes, _ in read),
            "macs_per_token": _macs(node, max((values for _, values in read), default=0)),
        }
        # A node that only prepares a weight is folded at load time; its reader counts the weight.
        if (cost["weight_bytes"] or cost["macs_per_token"]) and not _prepares(node, weights):
            costs[str(node.name)] = cost
    return {"nodes": sum(1 for _ in built.ir.graph), "context": CONTEXT, "costs": costs}


def _weights(built: BuiltModel) -> dict[str, tuple[int, int]]:
    """Map each initializer to its bytes and to the number of values in its matrix."""
    weights = {
        initializer.name: (initializer.nbytes, math.prod(slot.shape))
        for slot in built.slots
        if slot.table is None
        for initializer in slot.initializers()
    }
    return weights | {name: weights[shared] for name, shared in built.aliases.items()}


def _initializers(node: ir.Node) -> list[str]:
    """Return the initializers that `node` reads directly or through nodes that prepare them."""
    names: list[str] = []
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type in _PREPARATIONS:
            names += _initializers(producer)
        elif value is not None and value.is_initializer():
            names.append(str(value.name))
    return names


def _prepares(node: ir.Node, weights: Mapping[str, tuple[int, int]]) -> bool:
    read = _initializers(node)
    return node.op_type in _PREPARATIONS and bool(read) and all(name in weights for name in read)


def _macs(node: ir.Node, values: int) -> int:
    if node.op_type in _PRODUCTS:
        return values
    if node.op_type in ("Attention", "GroupQueryAttention"):
        # Queries times keys, then probabilities times values, over all cached positions.
        return 2 * _attention_width(node) * CONTEXT
    return 0


def _attention_width(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    assert shape is not None and isinstance(shape[2], int)
    return shape[2]
