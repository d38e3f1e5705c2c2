"""A format is a promise: packages written by earlier versions open, verify and answer.

`earlier_packages` holds tiny packages as those versions wrote them, certificate included. They are
never made again by today's code: a change of the format must leave them readable.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.measure.verify import verify
from llama_onnx.targets.package import ModelPackage

PACKAGES = sorted((Path(__file__).parents[1] / "support" / "earlier_packages").iterdir())


@pytest.fixture(params=PACKAGES, ids=lambda path: path.name)
def earlier(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_there_is_one() -> None:
    assert PACKAGES, "the tests below would hold for nothing"


def test_it_verifies(earlier: Path) -> None:
    report = verify(earlier)
    assert report.passed, report.checks
    assert report.checks, "the certificate was not replayed"


def test_a_changed_weight_is_found(earlier: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(earlier, tmp_path / "damaged")
    data = bytearray((damaged / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 0x40
    (damaged / "model.onnx.data").write_bytes(data)
    assert ModelPackage.open(damaged).verify() == ["model.onnx.data"]
    assert not verify(damaged).passed


def test_it_answers(earlier: Path) -> None:
    answer = Llama.load(earlier).generate("hello world", max_new_tokens=4)
    for _ in answer:
        pass
    assert answer.stats.new_tokens > 0


def test_its_weights_are_read_back(earlier: Path) -> None:
    weights = PackageCheckpoint.open(earlier)
    for name, shape in weights.config.tensor_shapes().items():
        assert weights.tensor(name).shape == shape
        assert weights.tensor(name).rows(0, 1).shape == (1, *shape[1:])
