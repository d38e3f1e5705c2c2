from __future__ import annotations

import json
from importlib.metadata import requires

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.registry import TARGETS, get_target
from llama_onnx.targets.target import Target


def test_a_target_is_found_by_its_name() -> None:
    assert get_target("cpu").session.provider == "CPUExecutionProvider"


def test_an_unknown_target_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no target 'gpu'; the known ones are: cpu") as caught:
        get_target("gpu")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_is_consistent(target: Target) -> None:
    assert target.graph.default_precision in target.graph.precisions
    wheels = [line for line in requires("llama-onnx") or [] if f'"{target.session.extra}"' in line]
    assert any(line.startswith(target.session.wheel) for line in wheels)


def test_the_command_shows_each_target_and_what_to_install() -> None:
    result = CliRunner().invoke(main, ["targets"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for target in TARGETS.values():
        row = next(line for line in result.stdout.splitlines() if f" {target.name} " in line)
        assert f"llama-onnx[{target.session.extra}]" in row
        assert ", ".join(target.graph.precisions) in row


def test_the_command_prints_json() -> None:
    result = CliRunner().invoke(main, ["targets", "--json"])
    listed = json.loads(result.stdout)
    assert [entry["name"] for entry in listed] == list(TARGETS)
    assert listed[0]["graph"]["default_precision"] == "int4"
    assert listed[0]["session"]["provider"] == "CPUExecutionProvider"
