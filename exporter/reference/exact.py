"""Makes a package's graph compute in float32, so that any difference is an error of the graph.

Nodes, weights and their order do not change. Int8 arithmetic is switched off, half-precision values
become float32, and half-precision weights are widened before the node that reads them.
"""

from __future__ import annotations

import onnx_ir as ir

from llama_onnx.exporter.graph.fused import INT8_CACHE
from llama_onnx.exporter.graph.names import COS_CACHE, SIN_CACHE, initializer_name, scope_of
from llama_onnx.exporter.graph.rotary import rotary_tables
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.storage import WEIGHT

_FP32_ARITHMETIC = 1  # MatMulNBits' accuracy_level; 4 rounds activations to int8 blocks
_PAST, _CACHE_SCALES = (3, 4), (12, 13)  # inputs of GroupQueryAttention
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TABLES = tuple(initializer_name(module, WEIGHT) for module in (COS_CACHE, SIN_CACHE))


def compute_in_float32(model: ir.Model, config: LlamaConfig) -> None:
    """Change `model`, a package's graph, in place.

    Half-precision rotary tables are replaced with exact ones, because PyTorch computes only with
    those; `parity.measure.rotary` checks the package's tables.
    """
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", _FP32_ARITHMETIC)
        if node.op_type == "GroupQueryAttention" and INT8_CACHE.keys() <= node.attributes.keys():
            _widen_cache(node)
    if not any(value.dtype in _HALF for value in model.graph.outputs):
        return
    for name, table in zip(_TABLES, rotary_tables(config), strict=True):
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(table, name=name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in list(model.graph.initializers.values()):
        if value.dtype in _HALF:
            _widen(value)
    for value in model.graph.inputs:
        _retype(value)
    for node in model.graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        for value in node.outputs:
            _retype(value)


def _widen_cache(node: ir.Node) -> None:
    """Let an attention keep keys and values in float32, not in int8."""
    for name in INT8_CACHE:
        del node.attributes[name]
    for index in _CACHE_SCALES:
        node.replace_input_with(index, None)
    for value in (*(node.inputs[index] for index in _PAST), *node.outputs[1:3]):
        assert value is not None, "an attention with a cache"
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _widen(value: ir.Value) -> None:
    """Insert a Cast between the initializer `value` and each node that reads it."""
    for node, index in list(value.uses()):
        scope = scope_of(node.name or "")
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
        cast.name = f"{scope}/widen_{value.name}"
        (wide,) = cast.outputs
        wide.name, wide.shape = f"{cast.name}_fp32", value.shape
        wide.type = ir.TensorType(ir.DataType.FLOAT)
        assert node.graph is not None
        node.graph.insert_before(node, cast)
        node.replace_input_with(index, wide)


def _retype(value: ir.Value) -> None:
    if value.dtype in _HALF:
        value.type = ir.TensorType(ir.DataType.FLOAT)
