"""Which matrix is stored how, where the user leaves it open."""

from __future__ import annotations

import pytest

from llama_onnx.exporter.model.recipe import make_recipe
from llama_onnx.exporter.model.storage import Floats, RowBlocks, make_storage
from llama_onnx.targets.errors import UsageError


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
