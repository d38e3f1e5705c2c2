"""Quantizers by name, and that the one chosen is the one that runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.storage import Blocks, Quantized
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.quantize import registry
from llama_onnx.exporter.quantize.base import CalibratedQuantizer
from llama_onnx.exporter.quantize.registry import (
    CALIBRATED,
    CORRELATING,
    QUANTIZERS,
    WEIGHING,
    get_quantizer,
)
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import get_target
from tests.support import tiny


class Constant:
    """A quantizer that makes every weight 3."""

    name, calibrates = "constant", False

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        blocks = storage.num_blocks(rows.shape[1])
        code = (1 << (storage.bits - 1)) + 3
        codes = np.full((len(rows), blocks * storage.block_size), code, np.uint8)
        return Quantized(codes, np.ones((len(rows), blocks), np.float32))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_has_the_name_it_is_registered_under(name: str) -> None:
    assert get_quantizer(name).name == name


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_a_plan_knows_of_a_quantizer_is_what_it_does(name: str) -> None:
    """A plan reads the tables of names, so that it imports no quantizer."""
    quantizer = get_quantizer(name)
    assert isinstance(quantizer, CalibratedQuantizer) == (name in CALIBRATED)
    if isinstance(quantizer, CalibratedQuantizer):
        assert quantizer.correlates == (name in CORRELATING)
        assert quantizer.weighs == (name in WEIGHING)


def test_an_unknown_quantizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown quantizer 'magic': use rtn"):
        get_quantizer("magic")
    source = tiny.write_huggingface(tmp_path / "source")
    with pytest.raises(UsageError, match="unknown quantizer 'magic'"):
        export_package(
            source, tmp_path / "out", get_target("cpu"), Options("int4", quantizer="magic")
        )
    result = CliRunner().invoke(main, ["plan", str(source), "--quantizer", "magic"])
    assert result.exit_code == 2
    assert "'rtn'" in result.output


@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_the_quantizer_that_is_asked_for_chooses_the_codes(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.QUANTIZERS, "constant", Constant)
    source, out = tiny.write_huggingface(tmp_path / "source"), tmp_path / "out"
    options = Options("int8", head="fp32", embedding="fp32", quantizer="constant")
    export_package(source, out, get_target(target), options)
    assert ModelPackage.open(out).manifest["recipe"]["quantizer"] == "constant"
    package = PackageCheckpoint.open(out)
    codes = package.tensor("model.layers.1.mlp.up_proj.weight")
    assert (codes.rows(0, codes.shape[0]) == 3).all()
    norm = package.tensor("model.norm.weight")
    np.testing.assert_array_equal(norm.rows(0, 64), tiny.weights(tiny.GQA)["model.norm.weight"])
