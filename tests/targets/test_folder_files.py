"""A name from a stranger opens a regular file of its own folder, or nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llama_onnx.targets.errors import CheckpointError, PackageError
from llama_onnx.targets.folder_files import file_inside, is_plain_name, open_inside

OUTSIDE = [
    "",
    ".",
    "..",
    "../secret",
    "a/../../secret",
    "/etc/passwd",
    "//server/share",
    "C:secret",
    "a\\b",
    "a\0b",
    "a\nb",
    "a//b",
    "a/./b",
    "NUL",
    "con.txt",
    "sub/COM1",
    "model.onnx.",
    "model.onnx ",
    "model.onnx::$DATA",
]

linux = pytest.mark.skipif(sys.platform == "win32", reason="needs links or FIFOs")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_or_mean_a_device_are_refused(name: str, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    with pytest.raises(PackageError, match="plain name"):
        file_inside(tmp_path, name, PackageError)


@pytest.mark.parametrize("name", ["a", "ä b.json", "adapters/fox.onnx_adapter", ".gitattributes"])
def test_plain_names_open(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"there")
    with open_inside(tmp_path, name) as file:
        assert file.read() == b"there"


@linux
def test_a_link_that_leads_nowhere_is_not_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="a is a link that leads nowhere"):
        file_inside(tmp_path, "a")


def test_a_missing_file_is_none_and_cannot_be_opened(tmp_path: Path) -> None:
    assert file_inside(tmp_path, "a") is None
    (tmp_path / "a").write_bytes(b"")
    assert file_inside(tmp_path, "a/b") is None
    with pytest.raises(CheckpointError, match="has no b"):
        open_inside(tmp_path, "b")


@linux
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"")
    (folder / "LICENSE").symlink_to("../secret")
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    for name in ("LICENSE", "up/secret"):
        with pytest.raises(CheckpointError, match="leads out of its folder"):
            file_inside(folder, name)


@linux
def test_links_inside_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"")
    (tmp_path / "real" / "b").symlink_to("a")
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    assert file_inside(tmp_path / "link", "b") == tmp_path / "link" / "b"


@linux
def test_the_hub_cache_leads_to_its_own_blobs_only(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--meta--llama" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for model in ("models--meta--llama", "models--other--model"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "hash").write_bytes(b"")
    (snapshot / "own").symlink_to("../../blobs/hash")
    (snapshot / "other").symlink_to("../../../models--other--model/blobs/hash")
    assert file_inside(snapshot, "own") == snapshot / "own"
    with pytest.raises(CheckpointError, match="leads out"):
        file_inside(snapshot, "other")


@linux
def test_a_fifo_a_folder_and_a_loop_of_links_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "folder", "loop"):
        with pytest.raises(CheckpointError):
            open_inside(tmp_path, name)
