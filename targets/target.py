"""A target: what the exporter must emit for a place to run, and how the runtime opens it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llama_onnx.targets.provider import Provider

FloatName = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Operators:
    """Which operators the graph may be made of.

    `standard`: ONNX's own alone, none of `com.microsoft`; the other fields mean nothing then.
    `packed_qkv`: GroupQueryAttention takes query, key and value as one matrix; `inner_rotary`: it
    rotates them itself. Whether there are kernels for: `fused_matmul` FusedMatMul, which multiplies
    by a transposed matrix; `rms_normalization` ONNX's RMSNormalization; `gather_blocks`
    GatherBlockQuantized, which reads rows of a quantized embedding.
    """

    standard: bool = False
    packed_qkv: bool = True
    inner_rotary: bool = True
    fused_matmul: bool = True
    rms_normalization: bool = True
    gather_blocks: bool = True


@dataclass(frozen=True)
class Graph:
    """What the exporter emits. Data, passed as an argument to whoever builds the graph.

    `precisions` are what the weights can be stored in; `activations` are the dtypes that can flow
    between the operators whatever the weights are, the first one unless another is asked for.
    `accuracy_level` is `MatMulNBits`' own: 4 computes in int8, 1 in fp32; where activations are
    half precision there is nothing to choose.
    """

    precisions: tuple[str, ...]
    default_precision: str
    activations: tuple[FloatName, ...] = ("fp32",)
    accuracy_level: int = 4
    operators: Operators = Operators()


@dataclass(frozen=True)
class Session:
    """How the runtime opens a package: the provider, and what this target asks beyond its options.

    `options` are onnxruntime-genai's session options. `shared_buffer`: the cache is one buffer of
    the whole length that past and present share; otherwise it grows by a copy at every step.
    """

    provider: Provider
    options: Mapping[str, int | str] = field(default_factory=dict)
    shared_buffer: bool = True


@dataclass(frozen=True)
class Target:
    """A place where a package runs."""

    name: str
    description: str
    graph: Graph
    session: Session
