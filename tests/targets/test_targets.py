from __future__ import annotations

import json
from importlib.metadata import requires

import onnxruntime
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from llama_onnx.exporter.cli import main
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import PROVIDERS, get_provider
from llama_onnx.targets.registry import TARGETS, get_target
from llama_onnx.targets.target import Target


def test_a_target_is_found_by_its_name() -> None:
    assert get_target("cpu").session.provider == PROVIDERS["cpu"]


def test_an_unknown_target_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"there is no target 'gpu': choose one of cpu") as caught:
        get_target("gpu")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_is_consistent(target: Target) -> None:
    assert target.graph.default_precision in target.graph.precisions
    assert target.session.provider in PROVIDERS.values()


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=lambda provider: provider.name)
def test_a_provider_s_extra_brings_its_wheels(provider: Provider) -> None:
    required = [Requirement(line) for line in requires("llama-onnx") or []]
    brought = {
        one.name
        for one in required
        if one.marker is not None
        and any(
            one.marker.evaluate({"extra": provider.extra, "sys_platform": platform})
            for platform in provider.platforms
        )
    }
    assert provider.wheel in brought
    assert provider.genai_wheel is None or provider.genai_wheel in brought
    # Another flavour would overwrite its files.
    others = {other.wheel for other in PROVIDERS.values()} - {provider.wheel}
    assert brought.isdisjoint(others)


def test_provider_names_are_onnx_runtime_s_own() -> None:
    known = onnxruntime.get_all_providers()
    assert {provider.ort_name for provider in PROVIDERS.values()} <= set(known)


def test_an_unknown_provider_is_answered_with_the_known_ones() -> None:
    assert get_provider("cuda").ort_name == "CUDAExecutionProvider"
    with pytest.raises(UsageError, match="there is no provider 'gpu': choose one of cpu, cuda, "):
        get_provider("gpu")


def test_the_command_shows_each_target_and_what_to_install() -> None:
    result = CliRunner().invoke(main, ["targets"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for target in TARGETS.values():
        row = next(line for line in result.stdout.splitlines() if f" {target.name} " in line)
        assert f".[{target.session.provider.extra}]" in row
        assert ", ".join(target.graph.precisions) in row


def test_the_command_prints_json() -> None:
    result = CliRunner().invoke(main, ["targets", "--json"])
    listed = json.loads(result.stdout)
    assert [entry["name"] for entry in listed] == list(TARGETS)
    assert listed[0]["graph"]["default_precision"] == "int4"
    assert listed[0]["session"]["provider"]["ort_name"] == "CPUExecutionProvider"
