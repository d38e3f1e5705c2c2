"""What a checkpoint's folder names is in the folder: links, names and FIFOs that say otherwise."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_onnx.exporter.checkpoints.checklist import verify_checklists
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError
from tests.support import adapters, gguf_files, meta_files, quantized, tiny
from tests.support.vocabularies import model_named, spm_metadata

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs links and FIFOs")

SECRET = "the content of a file elsewhere"


def _huggingface(folder: Path) -> None:
    tiny.write_huggingface(folder, shards=2)
    (folder / "generation_config.json").write_text('{"do_sample": false}', "utf-8")
    (folder / "special_tokens_map.json").write_text("{}", "utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", "utf-8")
    (folder / "NOTICE").write_text("a notice", "utf-8")
    (folder / "README.md").write_text("a card", "utf-8")


def _single(folder: Path) -> None:
    tiny.write_huggingface(folder)


def _pickled(folder: Path) -> None:
    tiny.write_huggingface(folder, pickled=True)


def _model_file(folder: Path) -> None:
    tiny.write_huggingface(folder, tiny.GQA)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model_named("plain"))
    (folder / "added_tokens.json").write_text("{}", "utf-8")


def _gptq(folder: Path) -> None:
    quantized.write(folder, quantized.quantize_model(tiny.GQA, bits=4, group_size=32))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(settings), "utf-8")


def _meta(folder: Path) -> None:
    meta_files.write_meta(folder, model_named("plain"))
    meta_files.write_checklist(folder)


def _gguf(folder: Path) -> None:
    folder.mkdir()
    gguf_files.write(folder / "model.gguf", keys=spm_metadata(model_named("plain")))


MADE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "huggingface": (
        _huggingface,
        (
            *("config.json", "generation_config.json", "model.safetensors.index.json"),
            *("model-00001-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json"),
            *("special_tokens_map.json", "chat_template.jinja", "LICENSE.txt", "USE_POLICY.md"),
            *("NOTICE", "README.md"),
        ),
    ),
    "single": (_single, ("model.safetensors",)),
    "pickled": (_pickled, ("pytorch_model.bin",)),
    "model-file": (_model_file, ("tokenizer.model", "added_tokens.json")),
    "gptq": (_gptq, ("quantize_config.json",)),
    "meta": (_meta, ("params.json", "consolidated.00.pth", "tokenizer.model", "checklist.chk")),
    "gguf": (_gguf, ("model.gguf",)),
}
FILES = [(kind, name) for kind, (_, names) in MADE.items() for name in names]


def _read(source: Path, out: Path) -> None:
    """Do what an export does before it writes weights."""
    checkpoint = open_checkpoint(source)
    checkpoint.licence_files()
    out.mkdir()
    checkpoint.write_tokenizer(out)
    verify_checklists(source, lambda _: None)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_link_out_of_the_folder_is_refused_by_name(kind: str, name: str, tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    MADE[kind][0](source)
    shutil.move(source / name, elsewhere)
    (source / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a link that leads out of its folder") as caught:
        _read(source, tmp_path / "out")
    assert name in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_fifo_is_refused_and_never_waited_for(kind: str, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    MADE[kind][0](source)
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(CheckpointError, match=r"is not a regular file|has no|lacks"):
        _read(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapters_files_are_in_its_folder(name: str, tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    factors = adapters.factors({"model.layers.0.self_attn.q_proj": 4})
    adapter = adapters.write_adapter(tmp_path / "adapter", factors)
    shutil.move(adapter / name, tmp_path / "elsewhere")
    (adapter / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_checkpoint(source, [adapter])


@pytest.mark.parametrize(
    "name",
    [
        *("../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "sub/", "//etc/passwd"),
        *("..\\secret", "C:secret", "C:\\secret", "a\0b", "a\nb", "con", "\x1b]0;x\x07", " "),
    ],
)
def test_an_index_names_files_of_its_folder_only(name: str, tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source", shards=2)
    (tmp_path / "secret").write_bytes((source / "model-00001-of-00002.safetensors").read_bytes())
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError, match="is not a plain name"):
        open_checkpoint(source)


def test_a_checklist_names_files_of_its_folder_only(tmp_path: Path) -> None:
    _meta(tmp_path / "source")
    (tmp_path / "secret").write_text(SECRET, "utf-8")
    for name in ("../secret", "/etc/passwd", "..\\secret", "a/b", ".."):
        (tmp_path / "source" / "checklist.chk").write_text(f"{'0' * 32}  {name}\n", "utf-8")
        with pytest.raises(CheckpointError, match="is not a checksum"):
            verify_checklists(tmp_path / "source", lambda _: None)


def test_a_folder_that_is_a_link_is_read(tmp_path: Path) -> None:
    _huggingface(tmp_path / "real")
    (tmp_path / "source").symlink_to(tmp_path / "real")
    _read(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_links_inside_the_folder_and_to_the_hubs_blobs_are_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--body" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--some--body" / "blobs"
    _huggingface(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / f"{number}")
        file.symlink_to(Path("../../blobs") / f"{number}")
    _read(snapshot, tmp_path / "out")
    inside = tmp_path / "inside"
    _huggingface(inside)
    (inside / "..data").mkdir()  # as Kubernetes mounts a volume
    shutil.move(inside / "config.json", inside / "..data" / "config.json")
    (inside / "config.json").symlink_to("..data/config.json")
    _read(inside, tmp_path / "out2")


def test_the_folder_above_has_metas_tokenizer(tmp_path: Path) -> None:
    _meta(tmp_path / "llama" / "7b")
    shutil.move(tmp_path / "llama" / "7b" / "tokenizer.model", tmp_path / "llama")
    assert open_checkpoint(tmp_path / "llama" / "7b").format == "meta"
    shutil.move(tmp_path / "llama" / "tokenizer.model", tmp_path / "elsewhere")
    (tmp_path / "llama" / "tokenizer.model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_checkpoint(tmp_path / "llama" / "7b")


def test_nothing_from_elsewhere_is_in_the_package(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    (tmp_path / "shadow").write_text(SECRET, "utf-8")
    (source / "LICENSE.md").symlink_to(tmp_path / "shadow")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        export_package(source, tmp_path / "out", TARGET, Options("int4"))
    assert not (tmp_path / "out").exists()
