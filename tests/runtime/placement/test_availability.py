"""Why a provider cannot run here, and what mends it: one sentence each."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.placement import availability
from llama_onnx.runtime.placement.availability import missing_libraries, require
from llama_onnx.runtime.placement.wheels import installed_flavours
from llama_onnx.targets.errors import ProviderError
from llama_onnx.targets.provider import Library, Provider
from llama_onnx.targets.providers import CPU, CUDA, DIRECTML, WEBGPU

HERE = replace(CUDA, platforms=(sys.platform,), libraries={})
"""CUDA, as far as wheels go, on whatever platform the tests run."""


def machine(
    monkeypatch: pytest.MonkeyPatch,
    ort: Mapping[str, str],
    genai: Mapping[str, str],
    available: tuple[str, ...] = ("CPUExecutionProvider",),
) -> None:
    """Pretend that these wheels are installed."""
    flavours = {"onnxruntime": ort, "onnxruntime_genai": genai}
    monkeypatch.setattr(availability, "installed_flavours", lambda module: dict(flavours[module]))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(available))


def refusal(provider: Provider, *, genai: bool = False) -> str:
    with pytest.raises(ProviderError) as caught:
        require(provider, genai=genai)
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_the_cpu_needs_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"onnxruntime": "1", "onnxruntime-gpu": "1"}, {})
    require(CPU)
    require(CPU, genai=True)


def test_the_cpu_wheel_does_not_do_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"onnxruntime": "1.32.0"}, {"onnxruntime-genai": "0.18.0"})
    assert refusal(HERE) == (
        "provider cuda cannot run here: it needs the wheel onnxruntime-gpu, and "
        "onnxruntime 1.32.0 is installed; run `python -m pip uninstall -y onnxruntime "
        'onnxruntime-genai && python -m pip install ".[cuda]"` in a clone of llama-onnx.'
    )


def test_two_flavours_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    # Whichever came last has its files there: it may even look right.
    machine(monkeypatch, both, {"onnxruntime-genai-cuda": "0.18.0"}, (CUDA.ort_name,))
    said = refusal(HERE)
    assert "onnxruntime and onnxruntime-gpu are installed at once" in said
    assert (
        "pip uninstall -y onnxruntime onnxruntime-genai-cuda onnxruntime-gpu && python -m pip"
        in said
    )


def test_two_flavours_of_genai_matter_to_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    genai = {"onnxruntime-genai": "0.18.0", "onnxruntime-genai-cuda": "0.18.0"}
    machine(monkeypatch, {"onnxruntime-gpu": "1.31.1"}, genai, (CUDA.ort_name,))
    require(HERE)
    assert "onnxruntime-genai and onnxruntime-genai-cuda are installed at once" in refusal(
        HERE, genai=True
    )


def test_missing_libraries_are_named_with_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"onnxruntime-gpu": "1.31.1"}, {}, (CUDA.ort_name,))
    there = Library("kernel32.dll" if sys.platform == "win32" else "libc.so.6", "buy one")
    libraries = (Library("libno-driver.so", "install a driver"), there, Library("libno.so", "pray"))
    lacking = replace(HERE, libraries={sys.platform: libraries})
    assert [library.name for library in missing_libraries(lacking)] == [
        "libno-driver.so",
        "libno.so",
    ]
    assert refusal(lacking) == (
        "provider cuda cannot run here: libno-driver.so, libno.so cannot be loaded; "
        "install a driver, and pray."
    )
    require(replace(HERE, libraries={sys.platform: (there,)}))


def test_what_onnxruntime_prints_about_libraries_stays_out_of_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libx"))
    missing_libraries(replace(HERE, libraries={sys.platform: (Library("libno.so", ""),)}))
    assert capsys.readouterr().out == ""


def test_a_platform_without_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert refusal(DIRECTML) == (
        "provider directml cannot run here: its wheels exist for Windows, and this is Linux; "
        "pass --provider cpu."
    )


def test_a_provider_without_a_genai(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"onnxruntime-webgpu": "1.27.0"}, {}, (WEBGPU.ort_name,))
    require(replace(WEBGPU, libraries={}))
    assert "no onnxruntime-genai for it" in refusal(WEBGPU, genai=True)


def install(folder: Path, name: str, files: tuple[str, ...]) -> None:
    """Write the metadata that pip leaves behind."""
    info = folder / f"{name.replace('-', '_')}-1.2.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_flavours_are_what_owns_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "onnxruntime-openvino", ("onnxruntime/__init__.py", "onnxruntime/a.py"))
    install(tmp_path, "ort-nightly-gpu", ("onnxruntime/__init__.py",))
    install(tmp_path, "onnxruntime-extensions", ("onnxruntime_extensions/__init__.py",))
    install(tmp_path, "onnxruntime-genai-cuda", ("onnxruntime_genai/__init__.py",))
    install(tmp_path, "someone-else", ("onnxruntime/__init__.py",))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_flavours("onnxruntime") == {
        "onnxruntime-openvino": "1.2.3",
        "ort-nightly-gpu": "1.2.3",
    }
    assert installed_flavours("onnxruntime_genai") == {"onnxruntime-genai-cuda": "1.2.3"}


def test_the_flavour_that_is_really_installed() -> None:
    (version,) = installed_flavours("onnxruntime").values()
    assert version == onnxruntime.__version__


# The command line


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], env={"COLUMNS": "160"}, input="")


def pretend_cpu_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"onnxruntime": "1.32.0"}, {"onnxruntime-genai": "0.18.0"})


@pytest.mark.skipif(sys.platform not in CUDA.platforms, reason="CUDA has no wheels here")
@pytest.mark.parametrize("verb", [("generate", "hello"), ("chat",), ("inspect",)])
def test_asking_for_cuda_with_the_cpu_wheel_is_exit_1(
    package: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    pretend_cpu_wheels(monkeypatch)
    result = run(verb[0], package, *verb[1:], "--provider", "cuda")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: provider cuda cannot run here: it needs the wheel")
    assert 'pip install ".[cuda]"` in a clone of llama-onnx.' in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform not in CUDA.platforms, reason="CUDA has no wheels here")
def test_a_fallback_is_the_user_s_choice_and_is_said(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cpu_wheels(monkeypatch)
    allowed = ("--provider", "cuda", "--allow-fallback")
    plain = run("generate", package, "hello", "--max-new-tokens", "5")
    result = run("generate", package, "hello", "--max-new-tokens", "5", *allowed)
    assert result.exit_code == 0
    assert result.stdout == plain.stdout
    assert "The CPU runs it instead, as --allow-fallback allows." in result.stderr
    said = json.loads(run("generate", package, "hello", "--json", *allowed).stdout)["provider"]
    assert (said["name"], said["asked"], said["device"]) == ("cpu", "cuda", "CPU")
    assert "onnxruntime-gpu" in said["fallback"]
    assert "The CPU runs it instead" in run("chat", package, *allowed).stderr


@pytest.mark.parametrize("verb", [("generate", "hello"), ("chat",), ("inspect",)])
def test_an_unknown_provider_is_a_wrong_call(package: Path, verb: tuple[str, ...]) -> None:
    result = run(verb[0], package, *verb[1:], "--provider", "gpu")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no provider 'gpu': choose one of cpu, cuda, directml, webgpu" in result.stderr


def inspect_json(*arguments: str | Path) -> dict[str, Any]:
    result = run("inspect", *arguments, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_inspect_says_where_the_nodes_run(package: Path) -> None:
    found = inspect_json(package, "--provider", "cpu")
    assert (found["kind"], found["fallback"], found["profile"]) == ("package", None, None)
    (share,) = found["placement"]["providers"]
    assert share["provider"] == "CPUExecutionProvider"
    assert share["fraction"] == {"nodes": 1.0, "weight_bytes": 1.0, "macs_per_token": 1.0}
    table = run("inspect", package, "--provider", "cpu", "--profile")
    (row,) = [line for line in table.stdout.splitlines() if "│ CPUExecutionProvider" in line]
    assert row.count("100.0 %") == 3
    assert "A prefill of 4 tokens ran" in table.stdout


@pytest.mark.skipif(sys.platform not in CUDA.platforms, reason="CUDA has no wheels here")
def test_inspect_shows_a_fallback(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cpu_wheels(monkeypatch)
    allowed = (package, "--provider", "cuda", "--allow-fallback")
    found = inspect_json(*allowed, "--profile")
    assert "onnxruntime-gpu" in found["fallback"]
    assert found["placement"]["asked"] == "CUDAExecutionProvider"
    nodes = found["placement"]["elsewhere"]
    assert {"MatMulNBits", "GroupQueryAttention"} <= {n["op"] for n in nodes if n["heavy"]}
    assert [kernels["provider"] for kernels in found["profile"]["kernels"]] == [CPU.ort_name]
    assert "as --allow-fallback allows" in run("inspect", *allowed).stdout


def test_inspect_with_a_provider_wants_a_package(tmp_path: Path, package: Path) -> None:
    result = run("inspect", tmp_path, "--provider", "cpu")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not a llama-onnx package" in result.stderr
    result = run("inspect", package, "--profile")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no effect without --provider" in result.stderr


def test_inspect_names_the_nodes_of_a_partial_assignment(capsys: Any, tmp_path: Path) -> None:
    from llama_onnx.exporter.commands.placement import print_placement
    from llama_onnx.runtime.placement.shares import AssignedNode, Placement

    nodes = (
        AssignedNode("layer.0/MatMulNBits_1", "MatMulNBits", "CPUExecutionProvider"),
        AssignedNode("Shape_1", "Shape", "CPUExecutionProvider"),
        AssignedNode("layer.1/MatMulNBits_2", "MatMulNBits", "CUDAExecutionProvider"),
    )
    placement = Placement("CUDAExecutionProvider", nodes, None).to_json()
    print_placement(tmp_path, {"placement": placement, "fallback": None, "profile": None})
    printed = capsys.readouterr().out
    assert "not on CUDAExecutionProvider" in printed
    assert "layer.0/MatMulNBits_1" in printed
    assert "layer.1/MatMulNBits_2" not in printed
    assert "Shape_1" not in printed, "small nodes are counted, not named"
    assert "Weights and work are unknown" in printed
