"""A model of a few nodes, for a trial of single operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.helper as oh
from onnx import numpy_helper

MICROSOFT = "com.microsoft"

Arrays = Mapping[str, np.ndarray]


def operator_model(
    nodes: Sequence[onnx.NodeProto], weights: Arrays, inputs: Arrays, outputs: Mapping[str, int]
) -> onnx.ModelProto:
    """Return the model of `nodes`, with free dimensions: `inputs` by what they are fed with,
    `outputs` by their ONNX types."""
    fed = [
        oh.make_tensor_value_info(
            name,
            oh.np_dtype_to_tensor_dtype(value.dtype),
            [f"{name} {axis}" for axis in range(value.ndim)],
        )
        for name, value in inputs.items()
    ]
    made = [oh.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = oh.make_graph(list(nodes), "one", fed, made, stored)
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid(MICROSOFT, 1)]
    return oh.make_model(graph, opset_imports=opsets, ir_version=10)
