"""Any runtime that conforms to ONNX opset 23: no operators of `com.microsoft`."""

from __future__ import annotations

from llama_onnx.targets.providers import CPU
from llama_onnx.targets.target import Graph, Operators, Session, Target

TARGET = Target(
    name="portable",
    description="any ONNX runtime, opset 23",
    graph=Graph(
        precisions=("fp32", "fp16", "int8", "int4"),
        default_precision="int4",
        operators=Operators(standard=True),
        sliding_window=True,
    ),
    session=Session(CPU, shared_buffer=False),
)
