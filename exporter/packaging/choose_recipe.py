"""The recipe of an export: what the user asked for, the target computes and the source holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.config import MATRICES
from llama_onnx.exporter.model.recipe import Recipe, make_recipe
from llama_onnx.exporter.packaging.attention import cache_mode, fitting_operators
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.quantize.registry import CALIBRATED, DEFAULT_QUANTIZERS, get_quantizer
from llama_onnx.exporter.quantize.source_codes import (
    describe_second_rounding,
    keep_source_codes,
    native_precision,
)
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import FloatName, Target


@dataclass(frozen=True)
class ChosenRecipe:
    """A recipe, and warnings for people."""

    recipe: Recipe
    warnings: tuple[str, ...]


def choose_recipe(
    checkpoint: Checkpoint, target: Target, options: Options, *, reads: bool, adapters: bool
) -> ChosenRecipe:
    """Return the recipe for `options` on `target`, with the source's codes where it has some.

    `reads`: there is a tokenizer to read a text with. `adapters`: some are kept beside the base.
    Raises `UsageError` for options that do not fit.
    """
    native = native_precision(checkpoint)
    if options.precision is None and native in target.graph.precisions:
        options = replace(options, precision=native)
    _check_quantizer(options, reads=reads)
    usual = options.quantizer or _usual_quantizer(options, target)
    possible = usual if reads else "rtn"
    recipe, slower = _resolved(checkpoint, target, replace(options, quantizer=possible), adapters)
    if options.quantizer is None and usual in CALIBRATED and _all_kept(checkpoint, recipe):
        plain = replace(options, quantizer="rtn")
        return ChosenRecipe(*_resolved(checkpoint, target, plain, adapters))
    if possible != usual:
        slower += (
            f"without a tokenizer {usual} cannot read a text with the model: the weights are "
            "rounded to nearest, which loses more.",
        )
    return ChosenRecipe(recipe, slower)


def _check_quantizer(options: Options, *, reads: bool) -> None:
    if options.quantizer in CALIBRATED and not reads:
        raise UsageError(
            f"the quantizer {options.quantizer} reads a text with the model's tokenizer, which is "
            "missing: use --quantizer rtn, or add the tokenizer."
        )


def _usual_quantizer(options: Options, target: Target) -> str:
    precision = options.precision or target.graph.default_precision
    return DEFAULT_QUANTIZERS.get(precision, "rtn")


def _all_kept(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Return whether all matrices of the decoder layers keep the codes of the source."""
    layers = range(checkpoint.config.num_hidden_layers)
    return all(
        f"model.layers.{layer}.{name}.weight" in recipe.source_codes
        for layer in layers
        for name in MATRICES
    )


def _resolved(
    checkpoint: Checkpoint, target: Target, options: Options, adapters: bool
) -> tuple[Recipe, tuple[str, ...]]:
    config = checkpoint.config
    operators, slower = fitting_operators(config, target)
    recipe = replace(resolve(options, target, tied=config.tie_word_embeddings), operators=operators)
    if adapters and (recipe.activations != "fp32" or recipe.operators.standard):
        raise UsageError(
            f"adapters can be kept beside the base only on targets with fp32 activations and ONNX "
            f"Runtime's own operators, not on {target.name}: merge them, without --keep-adapter."
        )
    recipe = replace(recipe, cache=cache_mode(options, recipe, target, adapters=adapters))
    kept = keep_source_codes(checkpoint, recipe, _chosen_storages(options))
    # A budget shares out all bytes, those of an embedding too that alone has codes to keep.
    shared = (options.budget, options.max_kl, options.minimize) != (None, None, None)
    if not shared or any(name.startswith("model.layers.") for name in kept.source_codes):
        recipe = kept
    again = describe_second_rounding(checkpoint, recipe)
    return recipe, (*slower, *((again,) if again else ()))


def resolve(options: Options, target: Target, *, tied: bool) -> Recipe:
    """Return the recipe for `options` on `target`; raise `UsageError` for what it cannot run."""
    precision = options.precision or target.graph.default_precision
    if precision not in target.graph.precisions:
        known = ", ".join(target.graph.precisions)
        raise UsageError(
            f"precision {precision!r} is not available for the target {target.name}: use {known}."
        )
    level = options.accuracy_level
    activations = _activations(options, target, precision)
    if level is not None and (activations != "fp32" or target.graph.operators.standard):
        raise UsageError(
            f"an accuracy level chooses between fp32 and int8 arithmetic, which the target "
            f"{target.name} with {activations} activations does not offer: leave it out."
        )
    return make_recipe(
        precision,
        tied=tied,
        block_size=options.block_size,
        quantizer=get_quantizer(options.quantizer or "rtn").name,
        embedding=options.embedding,
        head=options.head,
        accuracy_level=target.graph.accuracy_level if level is None else level,
        fuse_gate_up=options.fuse_gate_up,
        logits=options.logits,
        activations=activations,
        operators=target.graph.operators,
        calibrated=options.quantizer in CALIBRATED,
    )


def _activations(options: Options, target: Target, precision: str) -> FloatName:
    """Return the type of the values between operators: that in `options`, that of float weights,
    or the target's first choice."""
    known = target.graph.activations
    asked = options.activations
    if asked is not None and asked not in known:
        raise UsageError(
            f"{asked} activations are not available for the target {target.name}: use "
            f"{', '.join(known)}."
        )
    if asked is not None:
        return asked
    return next((dtype for dtype in known if dtype == precision), known[0])


def _chosen_storages(options: Options) -> tuple[str, ...]:
    return tuple(name for name in ("embedding", "head") if getattr(options, name) is not None)
