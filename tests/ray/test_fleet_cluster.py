"""`fleet` on a cluster: what a local run makes, with a process and the driver killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from llama_onnx.targets.package import ModelPackage
from tests.support.fleets import broken, model, write_fleet
from tests.support.tiny import write_huggingface


def started(file: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "fleet", str(file), "--json"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(file: Path, *options: str, status: int) -> dict[str, Any]:
    process = started(file, *options)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == status, errors.decode()
    assert b"Traceback" not in errors
    report: dict[str, Any] = json.loads(out)
    return report


def children() -> list[psutil.Process]:
    """The processes of tasks."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "llama_onnx.exporter.fleet.task_process" in " ".join(process.info["cmdline"] or ())
    ]


def wait_for_child(process: subprocess.Popen[bytes]) -> psutil.Process:
    deadline = time.monotonic() + 200
    while not (found := children()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


def test_a_cluster_makes_what_this_machine_does(cluster: str, tmp_path: Path) -> None:
    for seed in range(2):
        write_huggingface(tmp_path / f"m{seed}", seed=seed)
    broken(tmp_path / "bad")
    models = model("m0") + model("m1") + model("bad")
    file = write_fleet(tmp_path, models)
    process = started(file, "--ray", cluster)
    child = wait_for_child(process)
    child.send_signal(signal.SIGKILL)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 1, errors
    far = json.loads(out)
    assert (far["made"], far["unchanged"], far["failed"]) == (4, 0, 2)
    assert sum(len(task["died"]) for task in far["tasks"]) == 1
    here = tmp_path / "here"
    here.mkdir()
    local = file.read_text(encoding="utf-8").replace('"m', '"../m').replace('"bad', '"../bad')
    local = local.replace('"../made"', '"made"')
    (here / "fleet.toml").write_text(local, encoding="utf-8")
    near = run(here / "fleet.toml", "--threads", "1", status=1)
    for one, other in zip(far["tasks"], near["tasks"], strict=True):
        assert one["name"] == other["name"] and one["state"] == other["state"]
        if one["state"] == "made":
            assert one["predicted_memory_bytes"] == other["predicted_memory_bytes"]
            a = ModelPackage.open(tmp_path / "made" / one["name"])
            b = ModelPackage.open(here / "made" / one["name"])
            assert a.verify() == [] and a.files["model.onnx.data"] == b.files["model.onnx.data"]
    again = run(file, "--ray", cluster, status=1)
    assert (again["made"], again["unchanged"], again["failed"]) == (0, 4, 2)


def test_a_killed_driver_takes_its_tasks_along_and_the_next_goes_on(
    cluster: str, tmp_path: Path
) -> None:
    write_huggingface(tmp_path / "m0")
    file = write_fleet(tmp_path, model("m0"))
    process = started(file, "--ray", cluster)
    wait_for_child(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while children():
        assert time.monotonic() < deadline, "a task outlived its driver"
        time.sleep(0.1)
    report = run(file, "--threads", "1", status=0)
    assert report["made"] + report["unchanged"] == 2
    for task in report["tasks"]:
        assert ModelPackage.open(tmp_path / "made" / task["name"]).verify() == []


def test_what_no_machine_can_hold_is_a_row(cluster: str, tmp_path: Path) -> None:
    write_huggingface(tmp_path / "m0")
    file = write_fleet(
        tmp_path, model("m0", "calibration_tokens = 20000000"), 'quantizer = "awq"\n'
    )
    report = run(file, "--ray", cluster, status=1)
    assert "no machine of the cluster has more than" in report["tasks"][0]["reason"]


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    file = write_fleet(tmp_path, model("m0"))
    process = started(file, "--ray", "127.0.0.1:1")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert errors.decode().startswith("Error: there is no Ray cluster at '127.0.0.1:1'")
