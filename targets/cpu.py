"""x86-64 and ARM64 processors."""

from __future__ import annotations

from llama_onnx.targets.providers import CPU
from llama_onnx.targets.target import Graph, Operators, Session, Target

TARGET = Target(
    name="cpu",
    description="x86-64 and ARM64 processors",
    graph=Graph(
        precisions=("fp32", "fp16", "int8", "int4"),
        default_precision="int4",
        activations=("fp32",),
        accuracy_level=4,
        operators=Operators(
            zero_points=True, two_bits=True, folded_scales=True, computed_rotary=True
        ),
        any_heads=True,
        sliding_window=True,
    ),
    session=Session(CPU),
)
