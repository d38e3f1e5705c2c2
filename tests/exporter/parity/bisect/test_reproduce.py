"""The folder that shows a wrong piece, for the provider on which it is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.helper as oh
import onnx_ir as ir
import pytest
from onnx import TensorProto

from llama_onnx.exporter.parity.bisect.reproduce import write_reproduction
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU, DIRECTML


def write_doubling(out: Path, provider: Provider) -> Path:
    """A reproduction whose graph doubles its input, where one value of three was found wrong."""
    given = oh.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    doubled = oh.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = oh.make_graph([oh.make_node("Add", ["x", "x"], ["y"])], "one", [given], [doubled])
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
    x = np.array([1, 2, 3], np.float32)
    found = np.array([2, 4, 7], np.float32)
    piece = ir.serde.deserialize_model(model)
    write_reproduction(out, piece, {"x": x}, 2 * x, found, "Add is wrong.", provider)
    return out / "reproduce.py"


@pytest.mark.parametrize("provider", [CPU, DIRECTML], ids=["cpu", "directml"])
def test_the_script_runs_on_the_provider_and_says_what_ran(
    tmp_path: Path, provider: Provider
) -> None:
    """Here is no DirectML: ONNX Runtime takes the CPU, and the script must not hide that."""
    script = write_doubling(tmp_path / "out", provider)
    text = script.read_text("utf-8")
    assert f"needs {provider.wheel} and numpy" in text and provider.ort_name in text
    assert ("'device_id': '0'" in text) == (provider is DIRECTML)
    said = subprocess.check_output([sys.executable, str(script)], text=True)
    assert "Add is wrong.\nran on CPUExecutionProvider\ny, 3 values compared\n" in said
    assert "against found.npz   1 at most" in said
    assert "largest difference  0 at [0]" in said
