"""Which attention operators fit the geometry of a model."""

from __future__ import annotations

from dataclasses import replace

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.targets.errors import UnsupportedError
from llama_onnx.targets.target import Operators, Target

_ROTARY_HEADS, _HEADS = 16, 8
"""GroupQueryAttention accepts heads of multiples of 8, and of 16 if it also rotates them
(group_query_attention_helper.h in ONNX Runtime)."""


def fitting_operators(config: LlamaConfig, target: Target) -> tuple[Operators, tuple[str, ...]]:
    """Return the operators of `target` with which the heads of `config` can be computed, and
    warnings for people if they are not the fastest.

    Raises `UnsupportedError` if there are none, or if the target has no proved sliding window.
    """
    if config.window is not None and not target.graph.sliding_window:
        raise UnsupportedError(
            f"the model has a sliding window of {config.window} positions, which is not proved for "
            f"the target {target.name}: export for the target cpu or portable, or pass --context "
            f"{config.window} for a package whose texts fit into the window."
        )
    operators, size = target.graph.operators, config.head_dim
    if operators.standard or size % _ROTARY_HEADS == 0:
        return operators, ()
    if not target.graph.any_heads:
        raise UnsupportedError(
            f"head_dim {size} is not a multiple of {_ROTARY_HEADS}, which GroupQueryAttention "
            f"needs, and the target {target.name} has no other attention operator: export for the "
            "target cpu or portable."
        )
    split = replace(operators, packed_qkv=False, inner_rotary=False)
    if size % _HEADS == 0:
        return split, (
            f"head_dim {size} is not a multiple of {_ROTARY_HEADS}: the rotary embedding is "
            "computed outside the fused attention (GroupQueryAttention), which takes longer.",
        )
    return replace(split, fused_attention=False), (
        f"head_dim {size} is not a multiple of {_HEADS}: ONNX's Attention is used instead of the "
        "fused one (GroupQueryAttention), which takes longer and copies the cache at every step.",
    )
