"""The layout of a preset on one model, for a model of other depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.systems.layouts import write_recipe
from llama_onnx import plan
from llama_onnx.exporter.model.storage import RowBlocks
from tests.support import tiny


def group(bits: int, block_size: int, *tensors: str) -> dict[str, Any]:
    return {
        "bits": bits,
        "block_size": block_size,
        "zero_points": False,
        "order": "",
        "scales": "fp32",
        "stored_scales": "plain",
        "columnwise": False,
        "tensors": list(tensors),
    }


def test_each_layer_gets_the_storage_at_its_depth_and_the_head_that_of_the_embedding(
    tmp_path: Path,
) -> None:
    source = tiny.write_huggingface(tmp_path / "source", tiny.GQA)
    layers = tiny.GQA.num_hidden_layers
    package = tmp_path / "package"
    package.mkdir()
    # Twice as deep: its layers 2i and 2i + 1 stand for layer i, of which the first counts.
    names = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(2 * layers)]
    chosen = [
        group(8, 64, "model.embed_tokens.weight", names[0]),
        group(4, 128, *names[1:]),
    ]
    plain = {key: value for key, value in group(8, 64).items() if key != "tensors"}
    recipe = {
        "precision": "int4",
        "quantizer": "best",
        "fuse_gate_up": False,
        "linear": plain,
        "embedding": plain,
        "head": plain,
        "chosen": chosen,
    }
    (package / "manifest.json").write_text(json.dumps({"recipe": recipe}), "utf-8")
    write_recipe(package, source, tmp_path / "recipe.json")
    slots = plan(source, recipe=str(tmp_path / "recipe.json")).built.slots
    stored = {name: slot.storage for slot in slots for name in slot.sources}
    found = [stored[name] for name in ("lm_head.weight", *names[:layers])]
    forms = [(one.bits, one.block_size) for one in found if isinstance(one, RowBlocks)]
    assert forms == [(8, 64), (8, 64), *[(4, 128)] * (layers - 1)]
