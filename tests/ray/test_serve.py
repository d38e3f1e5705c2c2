"""`serve --ray` on two nodes in two network namespaces, as on two machines."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.ray_nodes import ADDRESSES, HEAD, WORKER, Nodes, inside, two_nodes, why_not

KEY, PORT, ROWS = "a key", "8123", 8
URL = f"http://{ADDRESSES[HEAD]}:{PORT}"
SECONDS = 240


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    if reason := why_not():
        pytest.skip(reason)
    with two_nodes(tmp_path_factory.mktemp("n")) as found:
        yield found


@dataclass
class Command:
    """`llama-onnx serve --ray` at work; what it has said is in `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def wait(self) -> None:
        """Wait until it listens."""
        deadline = time.monotonic() + SECONDS
        while "Listening on" not in self.said():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.2)


def serve(nodes: Nodes, package: Path, log: Path, *options: str) -> Command:
    """Start it in the head's namespace."""
    fixed = ["--ray", nodes.address, "--host", ADDRESSES[HEAD], "--port", PORT, "--api-key", KEY]
    python = [sys.executable, "-m", "llama_onnx.exporter.cli", "serve", str(package)]
    fixed += ["--name", "tiny", "--rows", str(ROWS), "--cache-memory", "64MB", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(inside(HEAD, [*python, *fixed]), stderr=file)
    return Command(process, log)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def replica(name: str) -> bool:
    """Whether a replica runs in a namespace."""
    return Nodes(Path(), []).find(name, REPLICA) != []


REPLICA = "ray::ServeReplica"


def test_a_killed_replica_costs_its_answers_in_work_alone_and_comes_back(
    nodes: Nodes, package_fp32: Path, tmp_path: Path
) -> None:
    command = serve(nodes, package_fp32, tmp_path / "log", "--replicas", "2")
    out = tmp_path / "load.jsonl"
    try:
        command.wait()
        assert replica(HEAD) and replica(WORKER)
        # Ray would ignore another address, and the one that is there may be for other clients.
        other = serve(nodes, package_fp32, tmp_path / "other", "--port", "8099")
        assert other.process.wait(SECONDS) == 2
        assert f"listens on {ADDRESSES[HEAD]}:{PORT}" in other.said()
        load = [sys.executable, "-m", "tests.support.serving_load", URL, "60", KEY]
        with out.open("wb") as file:
            clients = subprocess.Popen(inside(HEAD, load), stdout=file)
        while len(lines(out)) < 50:
            time.sleep(0.1)
        assert nodes.kill(WORKER, REPLICA) == 1
        killed = time.time()
        while not replica(WORKER) and time.time() < killed + SECONDS:
            time.sleep(0.2)
        assert clients.wait(SECONDS) == 0
        found = lines(out)
        failed = [line for line in found if not line["whole"]]
        print(f"{len(found)} requests, {len(failed)} failed: {failed[:3]}")
        assert 1 <= len(failed) <= ROWS + 2
        assert all(line["began"] <= killed + 1 for line in failed)
        assert replica(WORKER)
    finally:
        command.process.send_signal(signal.SIGINT)
    assert command.process.wait(SECONDS) == 0
    assert "Traceback" not in command.said()


def test_a_package_that_differs_on_a_node_is_refused(
    nodes: Nodes, package_fp32: Path, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(package_fp32, tmp_path / "tiny-fp32"))
    with (package / "model.onnx.data").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    command = serve(nodes, package, tmp_path / "log")
    assert command.process.wait(SECONDS) == 1
    assert "model.onnx.data changed" in command.said() and "Traceback" not in command.said()


def test_an_address_where_no_cluster_is_is_one_sentence(
    nodes: Nodes, package_fp32: Path, tmp_path: Path
) -> None:
    nowhere = Nodes(nodes.folder, [])
    command = serve(nowhere, package_fp32, tmp_path / "log", "--ray", f"{ADDRESSES[HEAD]}:7")
    assert command.process.wait(SECONDS) == 2
    (said,) = command.said().splitlines()
    assert "there is no Ray cluster at" in said


def test_after_a_node_is_gone_a_batch_goes_on(
    nodes: Nodes, package_fp32: Path, tmp_path: Path
) -> None:
    """By itself or, where Ray gives up, with the same command. The last test: one node is left."""
    fields = {"max_tokens": 60, "logit_bias": {"2": -100}}
    asked = [{"prompt": f"the {number}", **fields} for number in range(400)]
    source, out, log = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "log"))
    source.write_text("".join(json.dumps(each) + "\n" for each in asked), encoding="utf-8")
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "batch", str(package_fp32)]
    command += [str(source), str(out), "--ray", nodes.address, "--rows", "4"]
    command += ["--cache-memory", "64MB"]
    with log.open("wb") as file:
        process = subprocess.Popen(inside(HEAD, [*command, "--workers", "2"]), stderr=file)
    journal = out.with_name("out.jsonl.journal")
    deadline = time.monotonic() + SECONDS
    while not journal.exists() or journal.read_bytes().count(b"\n") < 40:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text("utf-8")
        time.sleep(0.1)
    while nodes.kill(WORKER):
        time.sleep(0.1)
    code, said = process.wait(SECONDS), log.read_text("utf-8")
    assert code in (0, 1) and "Traceback" not in said
    if code:
        assert "the cluster could not go on" in said and "is kept" in said
        kept = journal.read_bytes().count(b"\n") - 1
        again = inside(HEAD, [*command, "--workers", "1", "--json"])
        deadline = time.monotonic() + SECONDS
        done = subprocess.run(again, stdout=subprocess.PIPE, timeout=SECONDS)
        # It takes the cluster some seconds to notice that a node is gone.
        while done.returncode and time.monotonic() < deadline:
            time.sleep(3)
            done = subprocess.run(again, stdout=subprocess.PIPE, timeout=SECONDS)
        assert json.loads(done.stdout)["reused"] == kept >= 39
    found = lines(out)
    assert len(found) == 400
    assert all(line["response"]["status_code"] == 200 for line in found)
