from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import MANIFEST, ModelPackage, find_package, write_manifest

CONTENT = {
    "created_with": {"llama-onnx": "0.1.0"},
    "target": "cpu",
    "precision": "int4",
    "recipe": {},
    "source": {"format": "huggingface", "name": "tiny", "files": {}},
    "config": {},
}


@pytest.fixture
def opened(package: Path, tmp_path: Path) -> Path:
    """A copy of an exported package."""
    return Path(shutil.copytree(package, tmp_path / "package"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a manifest of two small files, one of them in a subfolder."""
    out = tmp_path / "out"
    (out / "parity").mkdir(parents=True)
    (out / "model.onnx").write_bytes(b"graph")
    (out / "parity" / "logits").write_bytes(b"logits")
    write_manifest(out, CONTENT)
    return out


def edit_manifest(folder: Path, **keys: Any) -> None:
    file = folder / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | keys), "utf-8")


def test_an_exported_package_opens_and_is_intact(package: Path) -> None:
    opened = ModelPackage.open(package)
    assert (opened.target, opened.precision) == ("cpu", "int4")
    assert opened.model_path.stat().st_size > 0
    assert opened.data_path.stat().st_size > 0
    assert opened.verify() == []


def test_the_manifest_names_every_file_of_an_exported_package(package: Path) -> None:
    files = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert set(ModelPackage.open(package).manifest["files"]) == files - {MANIFEST}


def test_the_manifest_holds_size_and_hash(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    assert manifest == {
        "format_version": 1,
        **CONTENT,
        "files": {
            "model.onnx": {"size": 5, "sha256": hashlib.sha256(b"graph").hexdigest()},
            "parity/logits": {"size": 6, "sha256": hashlib.sha256(b"logits").hexdigest()},
        },
    }


def test_open_accepts_a_string(opened: Path) -> None:
    assert ModelPackage.open(str(opened)).path == opened


def test_a_hash_that_is_known_is_not_computed_again(folder: Path) -> None:
    files = write_manifest(folder, CONTENT, hashes={"model.onnx": "known"}).files
    assert files["model.onnx"]["sha256"] == "known"
    assert files["parity/logits"]["sha256"] == hash_file(folder / "parity" / "logits")


def test_a_manifest_is_replaced_whole_or_not_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / MANIFEST).read_bytes()

    def fail(self: Path, target: Path) -> Path:
        raise OSError("power cut")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="power cut"):
        patch.setattr(Path, "replace", fail)
        write_manifest(folder, {**CONTENT, "precision": "fp32"})
    assert (folder / MANIFEST).read_bytes() == before
    # What the failed attempt left behind is not taken for a file of the package.
    write_manifest(folder, CONTENT)
    assert (folder / MANIFEST).read_bytes() == before


def test_verify_names_each_damaged_file(folder: Path) -> None:
    package = write_manifest(folder, CONTENT)
    (folder / "parity" / "logits").write_bytes(b"Logits")
    assert package.verify() == ["parity/logits"]
    (folder / "model.onnx").unlink()
    assert package.verify() == ["model.onnx", "parity/logits"]


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(PackageError, match=r"incomplete: model\.onnx is missing"):
        ModelPackage.open(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"gra")
    with pytest.raises(PackageError, match=r"model\.onnx is damaged: it has 3 bytes instead of 5"):
        ModelPackage.open(folder)


def test_a_folder_without_manifest_is_not_a_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is not a llama-onnx package"):
        ModelPackage.open(tmp_path)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="does not exist"):
        ModelPackage.open(tmp_path / "nothing")


def test_a_file_is_not_a_package(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(PackageError, match="is a file, not a package"):
        ModelPackage.open(tmp_path / "model.onnx")


def test_an_unfinished_export_is_refused(folder: Path) -> None:
    partial = folder.rename(folder.with_name("out.partial"))
    for path in (partial, folder):
        with pytest.raises(PackageError, match=r"unfinished export.*--resume"):
            ModelPackage.open(path)


def test_a_newer_format_is_refused_with_its_version(folder: Path) -> None:
    edit_manifest(folder, format_version=2)
    with pytest.raises(PackageError, match=r"format 2, but this llama-onnx reads format 1"):
        ModelPackage.open(folder)


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b"\xff", b'{"format_version": "1"}'])
def test_an_invalid_manifest(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(PackageError, match=r"manifest\.json is damaged"):
        ModelPackage.open(folder)


@pytest.mark.parametrize("key", ["target", "precision", "recipe", "source", "files"])
def test_a_manifest_that_lacks_something(folder: Path, key: str) -> None:
    edit_manifest(folder, **{key: None})
    with pytest.raises(PackageError, match=f"'{key}' is missing"):
        ModelPackage.open(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:\\x", "..\\x"])
def test_a_manifest_cannot_reach_outside_of_its_folder(folder: Path, name: str) -> None:
    edit_manifest(folder, files={name: {"size": 1, "sha256": ""}})
    with pytest.raises(PackageError, match="is invalid"):
        ModelPackage.open(folder)


@pytest.mark.parametrize("entry", [{}, {"size": "5", "sha256": ""}, {"size": 5}, 5])
def test_a_manifest_entry_of_the_wrong_shape(folder: Path, entry: Any) -> None:
    edit_manifest(folder, files={"model.onnx": entry})
    with pytest.raises(PackageError, match=r"entry for 'model\.onnx' is invalid"):
        ModelPackage.open(folder)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], r"'adapters' has the wrong type"),
        ({"x": "model.onnx"}, r"its adapter 'x' has no file"),
        ({"x": {}}, r"its adapter 'x' has no file"),
        ({"x": {"file": "../secret"}}, r"its adapter 'x' has no file"),
        ({"x": {"file": ["model.onnx"]}}, r"its adapter 'x' has no file"),
    ],
)
def test_an_adapter_of_the_manifest_is_a_file_of_the_package(
    folder: Path, adapters: Any, message: str
) -> None:
    edit_manifest(folder, adapters=adapters)
    with pytest.raises(PackageError, match=message):
        ModelPackage.open(folder)


def test_an_adapter_is_found_by_name_and_an_older_manifest_has_none(opened: Path) -> None:
    manifest = json.loads((opened / MANIFEST).read_text("utf-8"))
    del manifest["adapters"]
    (opened / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    assert ModelPackage.open(opened).adapters == {}
    edit_manifest(opened, adapters={"x": {"file": "tokenizer.json"}})
    assert ModelPackage.open(opened).adapter_path("x") == opened / "tokenizer.json"


@pytest.mark.parametrize("content", ["[]", '"text"', "1", "null"])
def test_a_manifest_that_is_not_an_object(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(PackageError, match=r"manifest\.json is damaged: it is not a JSON object"):
        ModelPackage.open(folder)


def test_a_package_is_found_in_a_folder_of_a_cloud(package: Path, tmp_path: Path) -> None:
    assert find_package(package) == package
    below = tmp_path / "name" / "1" / "package"
    shutil.copytree(package, below)
    for folder in (below, *below.parents[:3]):
        assert find_package(folder) == below
    with pytest.raises(PackageError, match="but 0 were found: put one package, with its manifest"):
        find_package(tmp_path / "nothing")
    shutil.copytree(package, tmp_path / "other")
    with pytest.raises(PackageError, match="but 2 were found"):
        find_package(tmp_path)
