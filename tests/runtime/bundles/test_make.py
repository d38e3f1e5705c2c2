"""A bundle is there whole or not at all, whatever happens while it is made."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.bundles.make import new_folder
from llama_onnx.targets.errors import UsageError

KILLED = """
import os, signal, sys
from llama_onnx.exporter.cli import main
from llama_onnx.runtime.bundles import make

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

setattr(make, sys.argv.pop(1), die)
main()
"""


def bundle(package: Path, out: Path, *options: str) -> Result:
    arguments = ["bundle", str(package), str(out), "--for", "hub", "--i-have-the-licence"]
    return CliRunner().invoke(main, [*arguments, *options])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("step", ["write_bundle", "flush_tree", "write_zip"])
def test_a_killed_bundle_is_cleaned_up_by_the_next(
    package: Path, tmp_path: Path, step: str
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, step, "bundle", str(package), str(out), "--zip"]
    done = subprocess.run([*command, "--for", "hub", "--i-have-the-licence"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if step == "write_zip":  # then the bundle itself is done
        (tmp_path / "out.zip.partial").write_bytes(b"half of it")
    else:
        assert names(tmp_path) == {"out.bundle.partial", "out.bundle.lock"}
    again = bundle(package, out, "--zip", "--force")
    assert again.exit_code == 0, again.output
    assert "was left by a bundle that was killed: it is removed" in again.stderr
    assert names(tmp_path) == {"out", "out.zip"}


def test_two_bundles_at_one_place(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        second = new_folder(tmp_path / "out")
        with pytest.raises(UsageError, match="another bundle is written to"), second:
            raise AssertionError
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"file"}


@pytest.mark.parametrize("copies_a_tree", [False, True])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copies_a_tree: bool
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    def fail(source: object, target: object) -> None:
        raise shutil.Error([(source, target, str(full))]) if copies_a_tree else full

    monkeypatch.setattr(shutil, "copyfile", fail)
    done = bundle(package, tmp_path / "out")
    assert done.exit_code == 1
    assert "the disk is full: free some space, then repeat the call" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert names(tmp_path) == set()


def test_a_bundle_in_its_package_or_around_it_is_refused(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "out" / "package"))
    before = names(copy)
    for out, said in ((copy / "x", "is inside the package"), (copy.parent, "holds the package")):
        done = bundle(copy, out, "--force")
        assert done.exit_code == 2
        assert said in done.stderr
    assert names(copy) == before and names(tmp_path / "out") == {"package"}


def test_two_places_are_a_wrong_call(package: Path, tmp_path: Path) -> None:
    done = bundle(package, tmp_path / "out", "--for", "web")
    assert (done.exit_code, names(tmp_path)) == (2, set())
    assert done.stderr == (
        "Error: --for takes one place: make one bundle for each, in folders of their own.\n"
    )


def test_a_bundle_is_not_bundled(package: Path, tmp_path: Path) -> None:
    (tmp_path / "bundled").mkdir()
    (tmp_path / "bundled/bundle.json").write_text("{}")
    done = bundle(tmp_path / "bundled", tmp_path / "out")
    assert done.exit_code == 1
    assert "bundled is a bundle, not a package: pass the package that it was" in done.stderr
