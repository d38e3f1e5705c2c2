"""What is written survives a power cut: on the disk before it has its name.

What reaches the disk cannot be seen from a process, so the order of the system's calls is: each
file and folder is flushed, then the name is given, then the folder of the name is flushed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.bundles.make import Settings, make_bundle
from llama_onnx.runtime.bundles.places import get_place
from llama_onnx.targets import lock as lock_module
from llama_onnx.targets.durable import replacing
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.lock import locked
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.signature import read_signer, write_signature
from tests.support import tiny
from tests.support.disk import FLUSH
from tests.support.keys import write_key

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see what is open")

Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of fsync and rename from now on, each with the path it is about."""
    seen: Calls = []

    def fsync(descriptor: int) -> None:
        seen.append(("flush", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        FLUSH(descriptor)

    def spy(name: str) -> None:
        real = getattr(Path, name)

        def call(self: Path, target: Path) -> Path:
            seen.append(("name", str(target)))
            result: Path = real(self, target)
            return result

        monkeypatch.setattr(Path, name, call)

    monkeypatch.setattr(os, "fsync", fsync)
    spy("rename")
    spy("replace")
    return seen


def check(calls: Calls, partial: Path, out: Path) -> None:
    """Everything in `out` was flushed as part of `partial` before it was called `out`."""
    named = calls.index(("name", str(out)))
    files = {partial / path.relative_to(out) for path in (out, *out.rglob("*"))}
    flushed = {path for what, path in calls[:named] if what == "flush"}
    assert {str(path) for path in files} <= flushed
    assert ("flush", str(out.parent)) in calls[named:]


def test_an_export(tmp_path: Path, calls: Calls) -> None:
    source, out = tiny.write_huggingface(tmp_path / "source"), tmp_path / "out"
    export_package(source, out, TARGETS["cpu"], Options("int4", quantizer="rtn"))
    check(calls, tmp_path / "out.partial", out)


@pytest.mark.parametrize("place", ["hub", "azureml", "sagemaker"])
def test_a_bundle(package: Path, tmp_path: Path, calls: Calls, place: str) -> None:
    out = tmp_path / "out"
    settings = Settings(licensed=True, as_zip=True)
    make_bundle(ModelPackage.open(package), out, get_place(place), settings)
    check(calls, tmp_path / "out.bundle.partial", out)
    archive = [path for _, path in calls].index(str(tmp_path / "out.zip.partial"))
    assert calls[archive:] == [
        ("flush", str(tmp_path / "out.zip.partial")),
        ("name", str(tmp_path / "out.zip")),
        ("flush", str(tmp_path)),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.zip"}


def test_a_signature(tmp_path: Path, calls: Calls) -> None:
    write_key(tmp_path, "mine")
    index = tmp_path / "manifest.json"
    index.write_text("{}")
    write_signature(index, read_signer(tmp_path / "mine.pem", lambda: ""))
    signature = f"{index}.sig"
    assert calls == [
        ("flush", str(index)),
        ("flush", f"{signature}.tmp"),
        ("name", signature),
        ("flush", str(tmp_path)),
    ]


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with locked(file, "busy."), pytest.raises(UsageError, match="busy"), locked(file, "busy."):
        raise AssertionError
    with locked(file, "busy."):
        pass


def test_a_lock_on_a_file_that_its_owner_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner removes the file when it is done; who opened it before has a lock on nothing."""
    file = tmp_path / "lock"
    real = lock_module._lock

    def lock_too_late(descriptor: int) -> None:
        file.unlink()
        real(descriptor)

    monkeypatch.setattr(lock_module, "_lock", lock_too_late)
    with pytest.raises(UsageError, match="busy"), locked(file, "busy."):
        raise AssertionError


def test_a_file_that_is_replaced_part_by_part(tmp_path: Path, calls: Calls) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"ne")
        (partial,) = (each for each in tmp_path.iterdir() if each != path)
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new"
    assert calls == [("flush", str(partial)), ("name", str(path)), ("flush", str(tmp_path))]
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"new"
