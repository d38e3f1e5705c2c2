"""Selects which codes of a quantized source go into the package unchanged.

The native precision of a quantized source is that of most of its codes. An export at the native
precision keeps all codes, whatever their bits. An export at another precision keeps only codes of
that precision; the other matrices are dequantized and stored as the recipe says.
"""

from __future__ import annotations

from dataclasses import replace

from llama_onnx.exporter.checkpoints.lora import LoraCheckpoint
from llama_onnx.exporter.model.checkpoint import Checkpoint, HoldsCodes
from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.targets.errors import UsageError


def innermost(checkpoint: Checkpoint) -> Checkpoint:
    """Return the base of `checkpoint`, without the adapters merged into it."""
    while isinstance(checkpoint, LoraCheckpoint):
        checkpoint = checkpoint.base
    return checkpoint


def native_precision(checkpoint: Checkpoint) -> str | None:
    """Return the precision of a quantized source, `int4` or `int8`; None for a source of floats."""
    source = innermost(checkpoint)
    return f"int{source.native_bits}" if isinstance(source, HoldsCodes) else None


def keep_source_codes(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """Return `recipe` with the source's codes kept wherever possible.

    Raises `UsageError` if codes would have to change: for an adapter merged into them, or for
    two matrices with different blocks that are to be fused.
    """
    native = native_precision(checkpoint)
    if native is None:
        return recipe
    if isinstance(checkpoint, LoraCheckpoint):
        if recipe.linear.name == native:
            raise UsageError(
                f"merging {checkpoint.folder} into the quantized {checkpoint.path} would quantize "
                f"it a second time: keep the adapter separate (--keep-adapter), use a precision "
                f"other than {native}, or merge the adapter into the original weights."
            )
        return recipe
    assert isinstance(checkpoint, HoldsCodes)
    if recipe.operators.standard:
        return recipe  # it cannot read codes in rows, zero points or column orders
    found = {}
    for name in checkpoint.config.tensor_shapes():
        bits = checkpoint.bits_of(name)
        wanted = recipe.head if name == "lm_head.weight" else recipe.linear
        if bits and wanted.name in (f"int{bits}", native):
            found[name] = replace(checkpoint.coded(name).storage, scales=recipe.activations)
    result = replace(recipe, source_codes=found)
    _check_fusion(checkpoint, result)
    return result


def _check_fusion(checkpoint: Checkpoint, recipe: Recipe) -> None:
    for layer in range(checkpoint.config.num_hidden_layers if recipe.fuse_gate_up else 0):
        names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        if not recipe.fit_together(names):
            raise UsageError(
                f"{checkpoint.path}: the gate and up projections of layer {layer} are quantized in "
                "different blocks and cannot be fused: remove --fuse-gate-up."
            )
