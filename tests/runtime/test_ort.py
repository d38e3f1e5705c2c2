"""The only import of onnxruntime: quiet, lazy, and with our exceptions."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from llama_onnx.runtime import ort
from llama_onnx.targets.errors import (
    MissingDependencyError,
    PackageError,
    ProviderError,
    ResourceError,
    UsageError,
)
from llama_onnx.targets.providers import CUDA
from tests.support.hostile_packages import endless_loop

WATCH = """
import os, sys
sys.addaudithook(
    lambda event, args: event == "import" and args[0] == "onnxruntime"
    and print("loads with", os.environ.get("ORT_DISABLE_TELEMETRY"))
)
"""
"""Prints the state of the usage reports at the moment onnxruntime is imported."""


USE = "from llama_onnx.runtime import ort; print(ort.version())"


def run(code: str, telemetry: str | None = None) -> list[str]:
    unset = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    environment = unset | ({} if telemetry is None else {"ORT_DISABLE_TELEMETRY": telemetry})
    code = WATCH + code
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split(
        "\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("module", ["exporter.packaging.export", "exporter.parity.prove"])
def test_an_exporter_that_loads_onnxruntime_sends_no_usage_reports(module: str) -> None:
    assert run(f"import llama_onnx.{module}\n{USE}") == [
        "loads with 1",
        onnxruntime.__version__,
        "",
    ]


@pytest.mark.parametrize(("telemetry", "seen"), [(None, "1"), ("1", "1"), ("0", "0")])
def test_usage_reports_are_the_users_choice(telemetry: str | None, seen: str) -> None:
    assert run(USE, telemetry)[0] == f"loads with {seen}"


def test_the_door_is_cheap_to_import() -> None:
    modules = "llama_onnx.runtime.ort, llama_onnx.runtime.measure.graph_session"
    assert run(f"import sys, {modules}; print('onnxruntime' in sys.modules)") == ["False", ""]


@pytest.fixture
def unloaded() -> Iterator[None]:
    ort.load.cache_clear()
    yield
    ort.load.cache_clear()


@pytest.mark.usefixtures("unloaded")
def test_a_missing_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"needs onnxruntime, .* not installed: run `"):
        ort.version()


def test_a_graph_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "ä model.onnx"
    file.write_bytes(b"not a graph")
    with pytest.raises(PackageError, match=r"^onnxruntime refuses .*ä model\.onnx: "):
        ort.create_session(file)
    with pytest.raises(PackageError, match=r"^onnxruntime refuses the graph: "):
        ort.create_session(b"not a graph")


def test_a_provider_the_wheel_lacks_does_not_become_the_cpu(package_fp32: Path) -> None:
    """onnxruntime's own fallback would open the graph on the CPU and only print that it did."""
    if CUDA.ort_name in ort.available_providers():
        pytest.skip("this wheel has CUDA")
    with pytest.raises(ProviderError, match="cuda"):
        ort.create_session(package_fp32 / "model.onnx", CUDA)


def test_what_fails_in_a_run_is_one_sentence_and_ours_pass_through() -> None:
    with (
        pytest.raises(PackageError, match=r"^onnxruntime failed in layer 3: no kernel$"),
        ort.running("in layer 3"),
    ):
        raise ValueError("no kernel\nand a trace")
    with pytest.raises(UsageError, match=r"^mine\.$"), ort.running("in layer 3"):
        raise UsageError("mine.")


def test_types_of_inputs_are_numpys(package_fp32: Path) -> None:
    session = ort.create_session(package_fp32 / "model.onnx")
    types = {entry.name: ort.numpy_dtype(entry.type) for entry in session.get_inputs()}
    assert types["input_ids"] is np.int64
    assert types["past_key_values.0.key"] is np.float32
    with pytest.raises(PackageError, match=r"type tensor\(bfloat16\), which numpy cannot hold"):
        ort.numpy_dtype("tensor(bfloat16)")


def test_an_adapter_file_gives_back_what_was_written(tmp_path: Path) -> None:
    values = {"a.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    ort.write_adapter(tmp_path / "ä.onnx_adapter", values)
    (found,) = ort.read_adapter(tmp_path / "ä.onnx_adapter").items()
    assert found[0] == "a.lora_A.weight"
    np.testing.assert_array_equal(found[1], values["a.lora_A.weight"])


def test_half_an_adapter_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object, path: str) -> None:
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("no space left\n")

    monkeypatch.setattr(onnxruntime.AdapterFormat, "export_adapter", fail)
    with pytest.raises(ResourceError, match=r"a\.onnx_adapter cannot be written.*: no space left$"):
        ort.write_adapter(tmp_path / "a.onnx_adapter", {"x": np.zeros(1, np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_a_run_ends_at_its_time_limit() -> None:
    """A loop without end, which `ModelPackage.open` would refuse: the second line of defense."""
    more, never = (
        helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("more", "never")
    )
    graph = helper.make_graph([endless_loop("more")], "endless", [more], [never])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.create_session(model.SerializeToString())
    with (
        pytest.raises(PackageError, match=r"a step of the graph was stopped after 0 s"),
        ort.time_limit(0.2) as options,
    ):
        session.run(None, {"more": np.array(True)}, options)
    with ort.time_limit(None) as options:
        assert options is None
