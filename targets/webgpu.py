"""GPUs through WebGPU, which uses Direct3D 12, Vulkan or Metal."""

from __future__ import annotations

from llama_onnx.targets.providers import WEBGPU
from llama_onnx.targets.target import Graph, Operators, Session, Target

TARGET = Target(
    name="webgpu",
    description="GPUs through WebGPU",
    graph=Graph(
        precisions=("fp16", "int8", "int4"),
        default_precision="int4",
        activations=("fp16", "fp32"),
        accuracy_level=0,
        operators=Operators(
            # It rotates the shorter rows of a padded batch by wrong positions.
            packed_qkv=False,
            inner_rotary=False,
            # Its FlashAttention is right only for as many keys as a subgroup has lanes (4, 8 and 16
            # were tried), and wrong on all in single steps of rows of different lengths. A sink
            # makes it use other kernels.
            empty_sink=True,
            fused_matmul=False,
            rms_normalization=False,
        ),
    ),
    session=Session(WEBGPU),
)
