"""A target: what the exporter emits for a kind of device, and how the runtime opens it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llama_onnx.targets.provider import Provider

FloatName = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Operators:
    """Which operators the graph may contain.

    `opset` is the version of ONNX's operators. `standard`: only these, none of `com.microsoft`; the
    other fields are then unused. `packed_qkv`: GroupQueryAttention accepts query, key and value as
    one matrix; `inner_rotary`: it applies the rotary embedding itself; `empty_sink`: it gets a sink
    that takes no attention, which changes no value but makes WebGPU choose other kernels. The
    others say whether there are kernels: `fused_matmul` for FusedMatMul, which multiplies by a
    transposed matrix; `fused_attention` for GroupQueryAttention, else ONNX's Attention is used;
    `rms_normalization` for ONNX's RMSNormalization; `gather_blocks` for GatherBlockQuantized, which
    reads rows of a quantized embedding. `wide_norms`: norms of values in half precision are
    computed in float32. `counted_positions`: positions are computed on the device alone, from masks
    that may be longer than the tokens, as captured graphs need.

    The rest say what matrices of a recipe may have, where that was measured: `zero_points`;
    `two_bits`; `folded_scales`, which the graph converts when the package is opened (see
    exporter/model/scales.py). `computed_rotary`: the rotary tables are computed then, too.
    `int8_cache`: GroupQueryAttention reads and writes keys and values as int8.
    """

    standard: bool = False
    opset: int = 23
    packed_qkv: bool = True
    inner_rotary: bool = True
    empty_sink: bool = False
    fused_attention: bool = True
    fused_matmul: bool = True
    rms_normalization: bool = True
    gather_blocks: bool = True
    wide_norms: bool = False
    counted_positions: bool = False
    zero_points: bool = False
    two_bits: bool = False
    folded_scales: bool = False
    computed_rotary: bool = False
    int8_cache: bool = False


@dataclass(frozen=True)
class Graph:
    """What the exporter emits.

    `precisions` are the ways to store the weights. `activations` are the dtypes that can flow
    between operators, independent of the weights; the first one is the default. `accuracy_level` is
    the attribute of `MatMulNBits`: 4 computes in int8, 1 in fp32; with activations in half
    precision it has no effect. `any_heads`: ONNX's Attention and RotaryEmbedding have kernels too,
    for models with heads that GroupQueryAttention refuses. `sliding_window`: attention over the
    last positions only is proved there.
    """

    precisions: tuple[str, ...]
    default_precision: str
    activations: tuple[FloatName, ...] = ("fp32",)
    accuracy_level: int = 4
    operators: Operators = Operators()
    any_heads: bool = False
    sliding_window: bool = False


@dataclass(frozen=True)
class Session:
    """How the runtime opens a package: the provider, and options of this target.

    `options` are session options of onnxruntime-genai. `shared_buffer`: past and present share one
    cache buffer of full length; otherwise the cache is copied and grows at every step.
    """

    provider: Provider
    options: Mapping[str, int | str] = field(default_factory=dict)
    shared_buffer: bool = True


@dataclass(frozen=True)
class Target:
    """A kind of device or runtime that packages are made for."""

    name: str
    description: str
    graph: Graph
    session: Session
