"""x86-64 and ARM64 processors."""

from __future__ import annotations

from llama_onnx.targets.providers import CPU
from llama_onnx.targets.target import Graph, Session, Target

TARGET = Target(
    name="cpu",
    description="x86-64 and ARM64 processors",
    graph=Graph(
        precisions=("fp32", "fp16", "int8", "int4"),
        default_precision="int4",
        activations=("fp32",),
        accuracy_level=4,
        any_heads=True,
        sliding_window=True,
    ),
    session=Session(CPU),
)
