"""GPUs and NPUs of all vendors on Windows."""

from __future__ import annotations

from llama_onnx.targets.providers import DIRECTML
from llama_onnx.targets.target import Graph, Operators, Session, Target

TARGET = Target(
    name="directml",
    description="DirectX 12 GPUs on Windows",
    graph=Graph(
        precisions=("fp16", "int8", "int4"),
        default_precision="int4",
        activations=("fp16",),
        accuracy_level=0,
        # Its GroupQueryAttention reads only query, key, value, cache and lengths: it would silently
        # ignore a packed matrix and rotary tables.
        operators=Operators(
            packed_qkv=False,
            inner_rotary=False,
            rms_normalization=False,
            gather_blocks=False,
            # Its norms overflow in half precision where values are large, as in some models' first
            # tokens: 20000 among 576 is enough.
            wide_norms=True,
            counted_positions=True,
            # It has no kernels for newer versions of Cast, Shape, Squeeze and Unsqueeze.
            opset=21,
        ),
    ),
    session=Session(DIRECTML),
)
