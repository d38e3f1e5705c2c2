"""Licences travel with the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_onnx.exporter.packaging.export import ExportResult, export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.provenance import LLAMA_2_NOTICE, model_name
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.licences import llama_generation
from tests.support import tiny


def export(source: Path) -> ExportResult:
    return export_package(source, source.with_name("out"), TARGET, Options("int4", quantizer="rtn"))


def test_what_stands_beside_the_weights_goes_into_the_package(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "Llama-2-7b-hf")
    (source / "NOTICE").write_text("their own", encoding="utf-8")
    (source / "README.md").write_text("a model card", encoding="utf-8")
    result = export(source)
    assert result.warnings == ()
    found = {
        name: (result.package / name).read_text("utf-8") for name in ("NOTICE", "MODEL_CARD.md")
    }
    assert found == {"NOTICE": "their own", "MODEL_CARD.md": "a model card"}
    manifest = json.loads((result.package / "manifest.json").read_text("utf-8"))
    assert {"LICENSE.txt", "USE_POLICY.md", "NOTICE"} <= manifest["files"].keys()


def test_llama_2_without_its_files_gets_a_notice_and_a_warning(tmp_path: Path) -> None:
    result = export(tiny.write_huggingface(tmp_path / "llama-2-7b-chat", licences=False))
    assert (result.package / "NOTICE").read_text("utf-8") == LLAMA_2_NOTICE
    (warning,) = result.warnings
    assert "no license and use policy file" in warning


def test_another_model_gets_no_notice_of_metas(tmp_path: Path) -> None:
    result = export(tiny.write_huggingface(tmp_path / "smollm", licences=False))
    assert not (result.package / "NOTICE").exists()
    (warning,) = result.warnings
    assert "no license file" in warning


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("Llama-2-7b-hf", 2),
        ("llama-2-13b-chat", 2),
        ("llama2", 2),
        ("models/llama-2-7b.Q4_0.gguf", 2),
        ("Llama-2-7b/snapshot", 2),
        ("Llama-3.2-1B", 3),
        ("llama-2024", None),
        ("TinyLlama-1.1B", None),
        ("smollm2", None),
        ("tinyllama2", None),
    ],
)
def test_paths_that_name_a_llama(path: str, expected: int | None) -> None:
    assert llama_generation(model_name(Path("/somewhere") / path), []) == expected


def test_a_llama_2_under_another_name_is_known_by_its_license(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "mine")
    text = "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023\n"
    (source / "LICENSE.txt").write_text(text, encoding="utf-8")
    (source / "USE_POLICY.md").unlink()
    result = export(source)
    assert (result.package / "NOTICE").read_text("utf-8") == LLAMA_2_NOTICE
    (warning,) = result.warnings
    assert "no use policy file" in warning
