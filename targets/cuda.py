"""NVIDIA GPUs."""

from __future__ import annotations

from llama_onnx.targets.providers import CUDA
from llama_onnx.targets.target import Graph, Operators, Session, Target

TARGET = Target(
    name="cuda",
    description="NVIDIA GPUs",
    graph=Graph(
        # No fp32: GroupQueryAttention has kernels for half precision only.
        precisions=("fp16", "bf16", "int8", "int4"),
        default_precision="int4",
        activations=("fp16", "bf16"),
        accuracy_level=0,
        # Right on an H200, and 9 to 13 % slower there than symmetric codes: docs/targets.md.
        operators=Operators(zero_points=True),
    ),
    session=Session(CUDA),
)
