"""An option without effect is refused; one that changes the package is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from tests.support import tiny
from tests.support.gguf_files import write as write_gguf


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_huggingface(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("--precision fp32 --block-size 32", "a block size applies to quantized matrices"),
        ("--precision fp16 --block-size 128", "a block size applies to quantized matrices"),
        ("--precision fp32 --quantizer rtn", "a quantizer applies to quantized matrices"),
        ("--precision fp32 --accuracy-level 1", "an accuracy level applies to quantized matrices"),
        ("--precision fp16 --accuracy-level 4 --embedding int8", "an accuracy level applies to"),
    ],
)
def test_an_option_without_effect_is_refused(
    source: Path, tmp_path: Path, choices: str, message: str
) -> None:
    for call in (("plan", source), ("export", source, tmp_path / "out")):
        said = run(*call, *choices.split())
        assert said.exit_code == 2 and message in said.output, said.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "choices",
    [
        "--precision fp32",
        "--precision fp32 --head int4 --block-size 64 --accuracy-level 1 --quantizer rtn",
        "--precision fp32 --embedding int8 --block-size 16",
        "--precision int4 --embedding fp32 --head fp16 --block-size 128",
    ],
)
def test_an_option_with_an_effect_is_accepted(source: Path, choices: str) -> None:
    assert run("plan", source, *choices.split()).exit_code == 0


def test_no_checksum_without_a_checklist(source: Path, tmp_path: Path) -> None:
    for given in (source, write_gguf(tmp_path / "m.gguf")):
        said = run("export", given, tmp_path / "out", "--no-checksum")
        assert said.exit_code == 2
        assert "has no checklist.chk to skip: leave out --no-checksum" in said.output
    assert not (tmp_path / "out").exists()
