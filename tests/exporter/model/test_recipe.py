"""Which matrix is stored how, where the user leaves it open."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llama_onnx.exporter.model.recipe import Recipe, check_storages, make_recipe
from llama_onnx.exporter.model.storage import Floats, RowBlocks, make_storage
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.target import Operators


def test_recipe_defaults() -> None:
    untied = make_recipe("int4", tied=False)
    assert (untied.embedding, untied.head) == (RowBlocks(8, 32), RowBlocks(4, 32))
    tied = make_recipe("int4", tied=True)
    assert tied.embedding == tied.head == RowBlocks(8, 32)
    assert make_recipe("fp16", tied=True).head == Floats("fp16")


def test_a_tied_matrix_follows_the_one_option_given() -> None:
    recipe = make_recipe("int4", tied=True, head="int4")
    assert recipe.embedding == recipe.head == RowBlocks(4, 32)


@pytest.mark.parametrize("name", ["int3", "float32", "bfloat16", ""])
def test_unknown_storage(name: str) -> None:
    with pytest.raises(UsageError, match="unknown precision"):
        make_storage(name, 32)


def test_unknown_block_size() -> None:
    with pytest.raises(UsageError, match="block size 48"):
        make_storage("int4", 48)


def test_tied_matrix_in_two_ways() -> None:
    with pytest.raises(UsageError, match="ties embedding and head"):
        make_recipe("int4", tied=True, head="int8", embedding="int4")


NAME = "model.layers.0.mlp.up_proj.weight"


def recipe_for(target: str) -> Recipe:
    return make_recipe("int4", tied=False, operators=TARGETS[target].graph.operators)


@pytest.mark.parametrize(
    ("storage", "operator", "words"),
    [
        (RowBlocks(4, 32, zero_points=True), "zero_points", "with zero points"),
        (RowBlocks(2, 32), "two_bits", "with 2 bits"),
        (RowBlocks(4, 32, stored_scales="uint8"), "folded_scales", "with scales as uint8"),
    ],
)
def test_a_storage_is_chosen_only_where_it_was_measured(
    storage: RowBlocks, operator: str, words: str
) -> None:
    for name, target in TARGETS.items():
        recipe = replace(recipe_for(name), chosen={NAME: storage})
        if getattr(target.graph.operators, operator):
            check_storages(recipe, name)
            continue
        with pytest.raises(UsageError, match=f"{NAME} {words}, which was not measured on .*{name}"):
            check_storages(recipe, name)


def test_zero_points_of_a_source_are_kept_on_every_target() -> None:
    kept = {NAME: RowBlocks(4, 32, zero_points=True)}
    recipe = replace(recipe_for("cuda"), operators=Operators(), source_codes=kept)
    check_storages(recipe, "cuda")


def test_codes_of_the_source_come_before_what_is_chosen() -> None:
    kept, chosen = RowBlocks(4, 128, zero_points=True), RowBlocks(8, 32)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    recipe = replace(recipe_for("cpu"), source_codes={names[0]: kept}, chosen={NAME: chosen})
    assert recipe.storage_of([names[0]], recipe.linear) == kept
    assert recipe.storage_of([NAME], recipe.linear) == chosen
    assert recipe.storage_of(["other"], recipe.linear) == recipe.linear
    assert not recipe.packs(names)
    # The same storage, but one has codes of its own: they are not of one quantizer.
    mixed = replace(recipe, chosen=dict.fromkeys(names[1:], kept))
    assert not mixed.packs(names)
    assert replace(recipe, source_codes={}, chosen=dict.fromkeys(names, kept)).packs(names)
