"""Which attention operators fit the geometry of a model, and what their cache may be."""

from __future__ import annotations

from dataclasses import replace

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.recipe import CacheMode, Recipe
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.errors import UnsupportedError, UsageError
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


def cache_mode(
    options: Options, recipe: Recipe, target: Target, *, adapters: bool
) -> CacheMode | None:
    """Return the type of the cache that `options` ask for; None if it is that of the activations.

    Raises `UsageError` if the attention of `recipe` has no such cache, or if the package keeps
    `adapters`, which change keys and values after their scales were measured.
    """
    if options.kv_cache is None:
        return None
    operators = recipe.operators
    if operators.standard or not operators.int8_cache:
        raise UsageError(
            f"a KV cache in {options.kv_cache} is not available for the target {target.name}: "
            "export for the target cpu, or leave out --kv-cache."
        )
    if not operators.fused_attention:
        raise UsageError(
            f"a KV cache in {options.kv_cache} needs GroupQueryAttention, which refuses this "
            "model's heads: leave out --kv-cache."
        )
    if adapters:
        raise UsageError(
            f"a KV cache in {options.kv_cache} has scales that fit the base, and an adapter "
            "changes keys and values: merge it, without --keep-adapter, or leave out --kv-cache."
        )
    return options.kv_cache
