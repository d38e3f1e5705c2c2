"""Values of a graph that are made of weights alone: scales in a smaller form, rotary tables.

ONNX Runtime computes them once, when it opens the graph. They belong to no layer: any piece that is
cut out of the graph has the nodes that make those it reads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.runtime import ort


def made_of_weights(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that nodes of `graph` make of initializers alone, not counting initializers
    that an input can replace."""
    given = set(graph.inputs)
    weights = {value for value in graph.initializers.values() if value not in given}
    found: set[ir.Value] = set()
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if read and all(value in weights or value in found for value in read):
            found.update(node.outputs)
    return found


def value_of(value: ir.Value) -> npt.NDArray[Any]:
    """Return `value`, an initializer or one of `made_of_weights`, as ONNX Runtime computes it."""
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    assert node is not None and isinstance(node.graph, ir.Graph), "it is made of weights"
    piece = ir.convenience.extract(node.graph, [], [str(value.name)])
    model = ir.Model(piece, ir_version=10)
    ir.external_data.load_to_model(model)
    session = ort.create_session(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(None, {})[0])
