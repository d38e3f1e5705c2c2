"""Chooses the operators of a graph."""

from __future__ import annotations

from llama_onnx.exporter.graph.fused import Fused
from llama_onnx.exporter.graph.operators import Dialect
from llama_onnx.exporter.graph.standard import Standard
from llama_onnx.exporter.model.recipe import Recipe


def dialect_of(recipe: Recipe) -> Dialect:
    """Return the dialect that uses the operators of `recipe`."""
    if recipe.operators.standard:
        return Standard()
    return Fused(recipe.operators, recipe.accuracy_level)
