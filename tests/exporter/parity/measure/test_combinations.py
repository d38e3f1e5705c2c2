"""Every combination of target, precision and activations that `export` allows can be validated, or
is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_onnx.exporter.formats.tensor import LazyTensor
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.weights import steps_apart
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.registry import TARGETS
from tests.support import tiny

COMBINATIONS = [
    (name, precision, activations)
    for name, target in TARGETS.items()
    for precision in target.graph.precisions
    for activations in target.graph.activations
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(tiny.GQA, num_hidden_layers=1)
    return tiny.write_huggingface(tmp_path_factory.mktemp("combinations") / "source", config)


@pytest.mark.parametrize(("target", "precision", "activations"), COMBINATIONS)
def test_what_can_be_exported_can_be_validated(
    source: Path, tmp_path: Path, target: str, precision: str, activations: str
) -> None:
    quantizer = "rtn" if precision == "int4" else None  # which is no part of the question
    options = Options(precision, activations=activations, quantizer=quantizer)  # type: ignore[arg-type]
    package = export_package(source, tmp_path / "out", TARGETS[target], options).package
    if activations == "bf16":  # which the CPU provider cannot compute in
        with pytest.raises(UsageError) as error:
            prove(package, open_checkpoint(source), tokens=2, longest=4)
        assert "has bf16 activations, for which ONNX Runtime has no CPU kernels" in str(error.value)
        return
    report = prove(package, open_checkpoint(source), tokens=2, longest=4)
    assert report.passed, [verdict for verdict in report.verdicts() if not verdict.passed]
    assert report.precision == precision


def test_a_step_of_bfloat16_is_the_distance_of_its_numbers() -> None:
    """Eight bits of precision: 2^-7 from 1 to 2, 2^-8 below 1, and twice that from 2 on."""
    original = np.array([[1, 0.5, -2.5]], np.float32)
    found = original + np.array([[2**-7, 2**-9, 2**-5]], np.float32)
    stored = LazyTensor("w", (1, 3), "BF16", 6, lambda *_: found)
    made_from = LazyTensor("w", (1, 3), "F32", 12, lambda *_: original)
    apart: Any = steps_apart(found, original, stored, made_from)
    np.testing.assert_allclose(apart, [[1, 0.5, 2]])
