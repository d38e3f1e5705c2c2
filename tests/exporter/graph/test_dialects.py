"""Each set of operators computes the same low-rank product, as numpy works it out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxscript import GraphBuilder

from llama_onnx.exporter.graph.dialects import dialect_of
from llama_onnx.exporter.graph.model import IR_VERSION
from llama_onnx.exporter.model.recipe import make_recipe
from llama_onnx.targets.registry import TARGETS


@pytest.mark.parametrize("target", ["cpu", "webgpu", "portable"])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_low_rank_product_is_numpy_s(target: str, rank: int) -> None:
    operators = TARGETS[target].graph.operators
    dialect = dialect_of(make_recipe("fp32", tied=False, operators=operators))
    opsets = {"": 23, **dialect.domains}
    graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="low_rank")
    builder = GraphBuilder(graph)
    x = builder.input("x", ir.DataType.FLOAT, ["batch_size", "sequence_length", 8])
    a = builder.input("a", ir.DataType.FLOAT, ["rank", 8])
    b = builder.input("b", ir.DataType.FLOAT, [5, "rank"])
    y = dialect.low_rank(builder.op, x, a, b)
    assert y.shape is not None and list(y.shape)[2] == 5
    builder.add_output(y, "y")
    proto = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 4, 8), "a": (rank, 8), "b": (5, rank)}
    feeds = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    expected = feeds["x"] @ feeds["a"].T @ feeds["b"].T
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-5)
