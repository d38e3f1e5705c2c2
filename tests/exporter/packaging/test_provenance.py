"""The source's hashes in the manifest: read, from Meta's checklist, or unknown. The hub's are in
tests/exporter/checkpoints/test_hub.py."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.cpu import TARGET
from tests.support import tiny
from tests.support.adapters import attention, factors, write_adapter
from tests.support.gguf_files import write as write_gguf
from tests.support.meta_files import write_checklist, write_meta
from tests.support.vocabularies import model_named, spm_metadata


def hashes(source: Path, **flags: Any) -> Any:
    out = source.with_name("out")
    package = export_package(
        source, out, TARGET, Options("int4", quantizer="rtn"), force=True, **flags
    ).package
    return json.loads((package / "manifest.json").read_text("utf-8"))["source"]["hashes"]


def digest(path: Path, algorithm: str = "sha256") -> str:
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


def test_hugging_faces_form_with_an_adapter(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source", shards=2)
    changes = factors(dict.fromkeys(attention(0, "q"), 4))
    adapter = write_adapter(tmp_path / "adapter", changes, layers_to_transform=[0])
    assert hashes(source) is None
    found = hashes(source, adapters=[adapter, adapter], hash_source=True)
    expected = {path.name: digest(path) for path in source.glob("*.safetensors")}
    for number in (1, 2):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            expected[f"adapter {number}/{name}"] = digest(adapter / name)
    expected["config.json"] = digest(source / "config.json")
    assert found == {"from": "read", "sha256": expected}


@pytest.mark.parametrize("above", [False, True])
def test_metas_form(tmp_path: Path, above: bool) -> None:
    source = write_meta(tmp_path / "llama-2-7b", model_named("plain"), shards=2)
    write_checklist(source)
    tokenizer = source / "tokenizer.model"
    if above:
        tokenizer = tokenizer.rename(tmp_path / "tokenizer.model")
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    verified = {name: digest(source / name, "md5") for name in names}
    assert hashes(source) == {"from": "checklist.chk", "md5": verified}
    assert hashes(source, checksum=False) is None
    read = {**{name: digest(source / name) for name in names}, "tokenizer.model": digest(tokenizer)}
    assert hashes(source, hash_source=True) == {"from": "read", "sha256": read}


def test_gguf(tmp_path: Path) -> None:
    model = spm_metadata(model_named("plain"))
    config = replace(tiny.GQA, vocab_size=520)
    source = write_gguf(tmp_path / "m.gguf", config, keys=model)
    read = {"from": "read", "sha256": {"m.gguf": digest(source)}}
    assert hashes(source, hash_source=True) == read
