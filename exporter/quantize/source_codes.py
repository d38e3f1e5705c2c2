"""Selects which codes of a quantized source go into the package unchanged.

The native precision of a quantized source is that of most of its codes. An export at the native
precision keeps all codes that a package can hold, whatever their bits. An export at another
precision keeps only codes of that precision; the other matrices are dequantized and stored as the
recipe says. An embedding or head for which the user chose a storage keeps only codes of that
storage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace

from llama_onnx.exporter.checkpoints.lora import LoraCheckpoint
from llama_onnx.exporter.model.checkpoint import Checkpoint, HoldsCodes
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.recipe import Recipe, readable_embeddings
from llama_onnx.exporter.model.storage import RowBlocks, Storage
from llama_onnx.targets.errors import UsageError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def innermost(checkpoint: Checkpoint) -> Checkpoint:
    """Return the base of `checkpoint`, without the adapters merged into it."""
    while isinstance(checkpoint, LoraCheckpoint):
        checkpoint = checkpoint.base
    return checkpoint


def native_precision(checkpoint: Checkpoint) -> str | None:
    """Return the precision of a quantized source, `int4` or `int8`; None for a source of floats."""
    source = innermost(checkpoint)
    bits = source.native_bits if isinstance(source, HoldsCodes) else None
    return f"int{bits}" if bits else None


def keep_source_codes(
    checkpoint: Checkpoint, recipe: Recipe, chosen: Collection[str] = ()
) -> Recipe:
    """Return `recipe` with the source's codes kept wherever possible. `chosen`: `embedding` and
    `head` if the user chose their storage.

    Raises `UsageError` if codes would have to change: for an adapter merged into them, or for
    two matrices with different blocks that are to be fused.
    """
    source = innermost(checkpoint)
    if not isinstance(source, HoldsCodes):
        return recipe
    native = native_precision(checkpoint)
    found = dict(_kept(source, source.config, recipe, chosen))
    if isinstance(checkpoint, LoraCheckpoint):
        in_layers = _decoder_matrices(source.config)
        if recipe.linear.name == native and 2 * len(found.keys() & in_layers) > len(in_layers):
            raise UsageError(
                f"merging {checkpoint.folder} into the quantized {checkpoint.path} would quantize "
                f"it a second time: keep the adapter separate (--keep-adapter), use a precision "
                f"other than {native}, or merge the adapter into the original weights."
            )
        return recipe
    if recipe.operators.standard:
        return recipe  # it cannot read codes in rows, zero points or column orders
    here = len(_decoder_matrices(source.config) - found.keys())
    result = replace(recipe, source_codes=found, quantized_here=here if found else 0)
    if EMBEDDING in found:
        result = replace(result, embedding=found[EMBEDDING])
    head = EMBEDDING if source.config.tie_word_embeddings else HEAD
    if head in found:
        result = replace(result, head=found[head])
    _check_fusion(checkpoint, result)
    return result


def describe_second_rounding(checkpoint: Checkpoint, recipe: Recipe) -> str | None:
    """Return the sentence about matrices whose codes the package should keep but cannot, so that
    they are quantized a second time; None if there are none."""
    source = innermost(checkpoint)
    if not isinstance(source, HoldsCodes):
        return None
    reasons: dict[str, Counter[str]] = {}
    for name in source.config.tensor_shapes():
        left = source.bits_of(name) and name not in recipe.source_codes
        reason = _reason(source, name, recipe) if left else None
        if reason and _storage_wanted(name, recipe).codes:
            reasons.setdefault(reason, Counter())[source.tensor(name).dtype] += 1
    if not reasons:
        return None
    because = "; ".join(
        f"{_counted(types)} {'is' if types.total() == 1 else 'are'} quantized a second time, "
        f"because {reason}"
        for reason, types in reasons.items()
    )
    closer = recipe.linear.name == "int4" and not recipe.operators.standard
    advice = ": pass --precision int8 to stay closer to the source" if closer else ""
    return f"{checkpoint.path}: {because}{advice}."


def _reason(source: HoldsCodes, name: str, recipe: Recipe) -> str | None:
    if obstacle := source.obstacle(name, recipe.activations):
        return obstacle
    standard = recipe.operators.standard
    return "ONNX's own operators read codes in another layout" if standard else None


def _counted(types: Counter[str]) -> str:
    first, *others = types.most_common()
    noun = "matrix" if first[1] == 1 else "matrices"
    return " and ".join(
        [f"{first[1]} {noun} stored as {first[0]}", *(f"{n} as {t}" for t, n in others)]
    )


def _kept(
    source: HoldsCodes, config: LlamaConfig, recipe: Recipe, chosen: Collection[str]
) -> Iterator[tuple[str, RowBlocks]]:
    """Yield the matrices whose codes can be kept, with their storage."""
    at_native = recipe.linear.name == f"int{source.native_bits}"
    asked = {HEAD} if "head" in chosen else set()
    if "embedding" in chosen or ("head" in chosen and config.tie_word_embeddings):
        asked.add(EMBEDDING)
    readable = readable_embeddings(recipe.operators)
    for name in config.tensor_shapes():
        bits = source.bits_of(name)
        if bits is None or source.obstacle(name, recipe.activations):
            continue
        same = _storage_wanted(name, recipe).name == f"int{bits}"
        readable_here = name != EMBEDDING or f"int{bits}" in readable
        if readable_here and (same or (at_native and name not in asked)):
            yield name, replace(source.coded(name).storage, scales=recipe.activations)


def _storage_wanted(name: str, recipe: Recipe) -> Storage:
    """Return the storage of tensor `name` if its codes are not kept."""
    return {EMBEDDING: recipe.embedding, HEAD: recipe.head}.get(name, recipe.linear)


def _decoder_matrices(config: LlamaConfig) -> set[str]:
    shapes = config.tensor_shapes().items()
    return {name for name, shape in shapes if len(shape) == 2} - {EMBEDDING, HEAD}


def _check_fusion(checkpoint: Checkpoint, recipe: Recipe) -> None:
    for layer in range(checkpoint.config.num_hidden_layers if recipe.fuse_gate_up else 0):
        names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
        if not recipe.fit_together(names):
            raise UsageError(
                f"{checkpoint.path}: the gate and up projections of layer {layer} are quantized in "
                "different blocks and cannot be fused: remove --fuse-gate-up."
            )
