"""A fleet: what is made, what is left alone, and what a death costs. Each task is a process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.fleet.fleet_file import read_fleet
from llama_onnx.exporter.fleet.local_workers import LocalWorkers
from llama_onnx.exporter.fleet.run import fleet_folder, run_fleet
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.bundle import Bundle
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import Silent
from llama_onnx.targets.registry import get_target
from tests.support.fleets import broken, model, write_fleet
from tests.support.keys import write_key
from tests.support.tiny import write_huggingface


def run(file: Path, *options: str) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(main, ["fleet", str(file), "--threads", "1", "--json", *options])
    return result, json.loads(result.stdout)


def states(report: dict[str, Any]) -> dict[str, str]:
    return {task["name"]: task["state"] for task in report["tasks"]}


@pytest.mark.slow
def test_a_fleet_from_its_first_run_to_a_changed_source(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "one")
    broken(tmp_path / "bad")
    private = write_key(tmp_path, "key")
    more = f'sign = "{private.name}"\nbundle = ["hub"]\ntargets = "cpu"'
    file = write_fleet(tmp_path, model("one", more) + model("bad") + model("absent"))
    result, report = run(file, "--jobs", "2")
    assert result.exit_code == 1
    assert "4 of 5 tasks failed" in result.stderr
    made, bad, *_, absent = report["tasks"]
    assert (made["state"], made["done"]) == ("made", ["export", "sign", "bundle hub"])
    assert "is not a whole safetensors file" in bad["reason"] and bad["attempts"] == 0
    assert "does not exist" in absent["reason"]
    assert made["predicted_memory_bytes"] > made["export_peak"] > 0
    package = ModelPackage.open(tmp_path / "made/one-cpu-int4")
    assert package.verify() == [] and package.unlisted().unknown == ()
    assert (package.path / "manifest.json.sig").is_file()
    assert Bundle.open(tmp_path / "made/one-cpu-int4-hub").verify() == []
    options = Options(precision="int4", quantizer="rtn")
    export_package(source, tmp_path / "alone", get_target("cpu"), options)
    alone = ModelPackage.open(tmp_path / "alone")
    assert hash_file(package.data_path) == hash_file(alone.data_path)
    page = (tmp_path / "made/fleet.html").read_text(encoding="utf-8")
    assert "one-cpu-int4" in page and "is not a whole safetensors file" in page
    assert json.loads((tmp_path / "made/fleet.json").read_text(encoding="utf-8")) == report

    weights = source / "model.safetensors"
    before = hash_file(package.data_path)
    assert states(run(file)[1])["one-cpu-int4"] == "unchanged"
    os.utime(weights)  # the same bytes at another time: read, and left alone
    assert states(run(file)[1])["one-cpu-int4"] == "unchanged"
    status = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0x40
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # hides it from make and rsync
    assert states(run(file)[1])["one-cpu-int4"] == "made"
    assert hash_file(ModelPackage.open(package.path).data_path) != before


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("nowhere.pem", "nowhere.pem cannot be read"),
        ("key.pub.pem", "is not a private key"),
        ("locked.pem", "set LLAMA_ONNX_KEY_PASSWORD"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_before_anything_runs(
    tmp_path: Path, key: str, said: str
) -> None:
    write_key(tmp_path, "key")
    write_key(tmp_path, "locked", password="secret")
    file = write_fleet(tmp_path, model("one", f'sign = "{key}"'))
    result = CliRunner().invoke(main, ["fleet", str(file)])
    assert (result.exit_code, said in result.stderr) == (2, True), result.output
    assert not (tmp_path / "made").exists()


class Killer(Silent):
    """Kills the first process that says it does something."""

    def __init__(self, workers: LocalWorkers) -> None:
        self.workers, self.killed = workers, False

    def update(self, what: str, done: int, total: int, unit: Any = "steps") -> None:
        if ": " in what and not self.killed:
            self.killed = True
            [(_, child)] = self.workers._children.values()
            os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_is_tried_again_as_often_as_allowed(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "one")
    fleet = read_fleet(write_fleet(tmp_path, model("one", 'target = "cpu"')))
    for retries, state in ((0, "failed"), (1, "made")):
        with fleet_folder(fleet):
            workers = LocalWorkers(1, 1)
            [row] = run_fleet(fleet, workers, retries=retries, progress=Killer(workers)).rows
        assert (row.state, row.attempts, len(row.died)) == (state, retries + 1, 1)
        assert "SIGKILL" in row.died[0]
    assert ModelPackage.open(tmp_path / "made/one-cpu-int4").verify() == []


def test_what_no_fleet_made_is_not_replaced(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "one")
    there = tmp_path / "made/one-cpu-int4"
    there.mkdir(parents=True)
    (there / "mine.txt").write_text("keep", encoding="utf-8")
    file = write_fleet(tmp_path, model("one", 'target = "cpu"'))
    result, report = run(file)
    assert result.exit_code == 1
    assert "no fleet made it" in report["tasks"][0]["reason"]
    assert report["tasks"][0]["attempts"] == 1
    assert (there / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_two_runs_in_the_same_folder(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "one")
    file = write_fleet(tmp_path, model("one"))
    with fleet_folder(read_fleet(file)):
        result = CliRunner().invoke(main, ["fleet", str(file)])
    assert result.exit_code == 2 and "another fleet is working" in result.stderr
