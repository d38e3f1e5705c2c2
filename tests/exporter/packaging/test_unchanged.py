"""A source that changes during an export gives no package."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.progress import Silent
from tests.support import tiny


class Meanwhile(Silent):
    """Does something to the source when the weights are written."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def step(self, what: str) -> None:
        if what == "running a step" and self.action is not None:
            self.action()
            self.action = None


def replaced(file: Path) -> None:
    """Replace the file by one of the same size and time of modification."""
    status = file.stat()
    copy = file.with_name("copy")
    shutil.copyfile(file, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a shard touched": lambda s: os.utime(s / "model-00001-of-00002.safetensors", ns=(1, 1)),
    "a shard longer": lambda s: os.truncate(s / "model-00002-of-00002.safetensors", 10**6),
    "a shard replaced": lambda s: replaced(s / "model-00001-of-00002.safetensors"),
    "the config": lambda s: (s / "config.json").write_text("{}", "utf-8"),
    "the tokenizer": lambda s: os.utime(s / "tokenizer.json", ns=(1, 1)),
    "a template that was not there": lambda s: (s / "chat_template.jinja").write_text("x", "utf-8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named_and_nothing_is_published(name: str, tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source", shards=2)
    meanwhile = Meanwhile(lambda: CHANGES[name](source))
    with pytest.raises(CheckpointError, match="changed while the export read it") as caught:
        export_package(
            source, tmp_path / "out", TARGET, Options("int4", quantizer="rtn"), progress=meanwhile
        )
    assert str(source) in str(caught.value)
    assert meanwhile.action is None
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_files_may_change(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    meanwhile = Meanwhile(lambda: (source / "training.log").write_text("x", "utf-8"))
    export_package(
        source, tmp_path / "out", TARGET, Options("int4", quantizer="rtn"), progress=meanwhile
    )
    assert meanwhile.action is None
