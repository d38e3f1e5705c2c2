"""Recipes and configs in plain words."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.commands.describe import (
    describe_config,
    describe_recipe,
    describe_weights,
)
from tests.support import tiny
from tests.support.packages import make_package


def way(name: str, block_size: int = 32) -> dict[str, Any]:
    if name.startswith("int"):
        return {"bits": int(name[3:]), "block_size": block_size}
    return {"name": name}


def recipe(embedding: Any, head: Any, linear: Any, **more: Any) -> dict[str, Any]:
    return {"embedding": embedding, "head": head, "linear": linear, **more}


@pytest.mark.parametrize(
    ("stored", "tied", "said"),
    [
        (
            recipe(way("int8"), way("int4"), way("int4")),
            False,
            "embedding int8, head int4, other matrices int4 in blocks of 32",
        ),
        (
            recipe(way("int8"), way("int8"), way("int4")),
            True,
            "embedding and head (one matrix) int8, other matrices int4 in blocks of 32",
        ),
        (
            recipe(way("int8"), way("int8"), way("int8", 32)),
            False,
            "all matrices int8 in blocks of 32",
        ),
        (recipe(way("fp16"), way("fp16"), way("fp16")), True, "all matrices fp16"),
        (
            recipe(way("fp32"), way("int8", 64), way("int4", 64)),
            False,
            "embedding fp32, head int8, other matrices int4 in blocks of 64",
        ),
        (
            recipe(way("int8"), way("int4"), way("fp16")),
            False,
            "embedding int8 in blocks of 32, head int4 in blocks of 32, other matrices fp16",
        ),
        (
            recipe(
                way("int8"),
                way("fp16"),
                way("int4"),
                taken_over=[{**way("int4", 128), "reordered": False, "tensors": 21}],
            ),
            False,
            "embedding int8 in blocks of 32, head fp16, other matrices int4 in blocks of 128",
        ),
    ],
)
def test_weights(stored: dict[str, Any], tied: bool, said: str) -> None:
    assert describe_weights(stored, tied=tied) == said


def test_what_the_graph_computes() -> None:
    stored = recipe(
        way("int8"),
        way("int4"),
        way("int4"),
        quantizer="rtn",
        accuracy_level=1,
        logits="last",
        fuse_gate_up=True,
        swappable=["q_proj"],
        taken_over=[{**way("int4"), "reordered": False, "tensors": 21}],
    )
    rows = dict(describe_recipe(stored))
    assert rows["quantizer"] == "rtn; 21 matrices keep the source's codes"
    assert rows["arithmetic"] == "fp32 activations, quantized matrices multiplied in fp32"
    assert rows["graph"] == (
        "logits for the last position only; ONNX Runtime's own operators; "
        "gate and up projections in one matrix; adapters can change q_proj"
    )
    half = {**stored, "activations": "fp16", "operators": {"standard": True}}
    assert dict(describe_recipe(half))["arithmetic"] == "fp16 activations"
    assert "standard ONNX operators only" in dict(describe_recipe(half))["graph"]
    floats = recipe(way("fp32"), way("fp32"), way("fp32"))
    assert dict(describe_recipe(floats))["quantizer"] == "none: no matrix is quantized"


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        (None, "theta 10,000, not scaled"),
        ("linear", "theta 10,000, linear scaling by 4"),
        (
            "llama3",
            "theta 10,000, llama3 scaling by 4 from 64 positions; "
            "low freq factor 1.0, high freq factor 4.0",
        ),
        ("yarn", "theta 10,000, yarn scaling by 4 from 64 positions"),
    ],
)
def test_rope(scaling: str | None, said: str) -> None:
    config = replace(tiny.GQA, rope_scaling=tiny.ROPE_SCALINGS[scaling] if scaling else None)
    assert dict(describe_config(asdict(config)))["rope"] == said


def test_a_config_of_an_earlier_version_may_lack_keys() -> None:
    assert describe_config({}) == []
    rows = dict(describe_config({**asdict(tiny.GQA), "eos_token_ids": [2, 3], "pad_token_id": 0}))
    assert rows["special tokens"] == "start 1; end 2, 3; padding 0"
    assert rows["attention"] == "4 heads of width 16, 2 for keys and values"


def test_plan_and_inspect_show_no_python(tmp_path: Path) -> None:
    package = make_package(tmp_path, "int4")
    planned = ["plan", tmp_path / "checkpoint", "--quantizer", "rtn"]
    for arguments in (planned, ["inspect", package]):
        result = CliRunner().invoke(main, [*map(str, arguments)], env={"COLUMNS": "120"})
        assert "embedding int8, head int4, other matrices int4 in blocks of 32" in result.stdout
        assert not set("{}[]'") & set(result.stdout.replace("ONNX Runtime's", "")), result.stdout
        assert "None" not in result.stdout and "False" not in result.stdout


def test_an_earlier_manifest_without_a_config_is_shown(package: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(package, old)
    manifest = json.loads((old / "manifest.json").read_text("utf-8"))
    del manifest["config"], manifest["recipe"]["activations"], manifest["recipe"]["operators"]
    (old / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = CliRunner().invoke(main, ["inspect", str(old)])
    assert result.exit_code == 0, result.output
    assert "fp32 activations" in result.stdout
