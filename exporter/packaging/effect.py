"""Refuses options that would have no effect, because the user expects one."""

from __future__ import annotations

from collections.abc import Collection

from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.exporter.quantize.registry import CALIBRATED
from llama_onnx.targets.errors import UsageError


def check_effect(explicit: Collection[str], recipe: Recipe) -> None:
    """Raise `UsageError` if one of `explicit`, names of fields of `Options`, has no effect on a
    package made with `recipe`."""
    multiplied = _quantized(recipe.linear.name, recipe.head.name)
    if "accuracy_level" in explicit and not multiplied:
        raise UsageError(
            f"an accuracy level applies to quantized matrices, and a package of {recipe.precision} "
            "multiplies by none: leave it out."
        )
    if multiplied or _quantized(recipe.embedding.name):
        _check_calibration(explicit, recipe)
        return
    for name in ("block_size", "quantizer", "calibration", "calibration_tokens"):
        if name in explicit:
            raise UsageError(
                f"a {name.replace('_', ' ')} applies to quantized matrices, and a package of "
                f"{recipe.precision} has none: leave it out, or choose precision int8 or int4."
            )


def _check_calibration(explicit: Collection[str], recipe: Recipe) -> None:
    if recipe.quantizer in CALIBRATED:
        return
    for name in ("calibration", "calibration_tokens"):
        if name in explicit:
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with the quantizer {recipe.quantizer}, "
                f"which reads no text: leave it out, or choose {' or '.join(CALIBRATED)}."
            )


def _quantized(*storages: str) -> bool:
    return any(name.startswith("int") for name in storages)
