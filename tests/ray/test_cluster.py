"""`batch` and `evaluate` on a cluster: the answers and figures of a local run, whatever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pytest
from pyarrow import parquet

from llama_onnx.runtime.batch.lines import open_source
from llama_onnx.targets.errors import UsageError
from tests.support.batches import chat_line, failure_of, read_lines, text_of, write_lines

GREEDY = {"temperature": 0, "logit_bias": {"2": -100}}


def started(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments: str, status: int = 0) -> str:
    process = started(*arguments)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == status, errors.decode()
    assert b"Traceback" not in errors
    return (out if status == 0 else errors).decode()


def batch(package: Path, source: Path, out: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        run("batch", str(package), str(source), str(out), "--json", *options)
    )
    return found


def actors() -> list[psutil.Process]:
    """The processes of actors, which Ray names so."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "ray::MapWorker" in " ".join(process.info["cmdline"] or ())
    ]


def texts(path: Path) -> list[str]:
    return [text_of(line) for line in read_lines(path)]


def requests(count: int, **fields: Any) -> Sequence[str]:
    return [chat_line(str(n), f"the {n}", **GREEDY, **fields) for n in range(count)]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bad = ["{broken", '{"messages": 3}', '{"prompt": "the quick", "max_tokens": 4}']
    return write_lines(tmp_path_factory.mktemp("lines") / "in.jsonl", [*requests(100), *bad])


def test_a_cluster_answers_as_this_machine_does(
    package_fp32: Path, lines: Path, cluster: str, tmp_path: Path
) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    local = batch(package_fp32, lines, here, "--workers", "2")
    far = batch(package_fp32, lines, there, "--ray", cluster)
    assert (far["lines"], far["errors"], far["workers"]) == (103, 2, 2)
    assert far["new_tokens"] == local["new_tokens"]
    ours, theirs = read_lines(here), read_lines(there)
    assert [line["custom_id"] for line in ours] == [line["custom_id"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        if one["error"] or one["response"]["status_code"] != 200:
            assert failure_of(one) == failure_of(other)
        else:
            assert text_of(one) == text_of(other)


def test_parquet_is_read_by_the_actors(package_fp32: Path, cluster: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the {n}", "max_tokens": 4, "temperature": 0.0, "seed": None, "n": None}
        for n in range(50)
    ]
    rows[7]["n"] = 2
    source = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), source, row_group_size=20)
    plain = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows]
    batch(package_fp32, source, tmp_path / "p.jsonl", "--ray", cluster)
    batch(package_fp32, source, tmp_path / "l.jsonl", "--workers", "1")
    same = write_lines(tmp_path / "in.jsonl", plain)
    batch(package_fp32, same, tmp_path / "j.jsonl", "--workers", "1")
    assert texts(tmp_path / "p.jsonl") == texts(tmp_path / "j.jsonl") == texts(tmp_path / "l.jsonl")
    assert len(read_lines(tmp_path / "p.jsonl")[7]["response"]["body"]["choices"]) == 2


def test_values_that_python_does_not_have_are_one_sentence(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    day = pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32())  # in the year 29349
    parquet.write_table(pyarrow.table({"prompt": ["a"], "day": day}), source)
    lines = open_source(source)
    with pytest.raises(UsageError, match="values that cannot be read"):
        list(lines.read(bytearray(lines.count)))


def wait_for(journal: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many lines are finished."""
    deadline = time.monotonic() + 400
    while not journal.exists() or journal.read_bytes().count(b"\n") <= count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_what_dies_costs_nothing(package_fp32: Path, cluster: str, tmp_path: Path) -> None:
    """An actor, then the driver; then the same command, here, goes on."""
    source = write_lines(tmp_path / "in.jsonl", requests(300, max_completion_tokens=100))
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    arguments = ["batch", str(package_fp32), str(source), str(out)]
    process = started(*arguments, "--ray", cluster)
    wait_for(journal, 40, process)
    actors()[0].kill()
    wait_for(journal, 160, process)
    process.kill()
    process.communicate()
    kept = [line.split(b" ", 5)[5] for line in journal.read_bytes().splitlines()[1:-1]]
    summary = batch(package_fp32, source, out, "--workers", "2")
    assert 160 <= summary["reused"] < 300
    found = read_lines(out)
    assert [line["custom_id"] for line in found] == [str(n) for n in range(300)]
    assert set(kept) <= set(out.read_bytes().splitlines())
    assert {line["response"]["status_code"] for line in found} == {200}


def test_a_killed_actor_is_replaced_to_the_end(
    package_fp32: Path, cluster: str, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", requests(200, max_completion_tokens=60))
    out = tmp_path / "out.jsonl"
    process = started("batch", str(package_fp32), str(source), str(out), "--ray", cluster)
    wait_for(tmp_path / "out.jsonl.journal", 40, process)
    os.kill(actors()[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert [line["custom_id"] for line in read_lines(out)] == [str(n) for n in range(200)]


def test_a_package_that_differs_is_found_before_anything_runs(
    package_fp32: Path, lines: Path, cluster: str, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(package_fp32, tmp_path / "tiny-fp32"))
    with (package / "model.onnx.data").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    out = tmp_path / "out.jsonl"
    said = run("batch", str(package), str(lines), str(out), "--ray", cluster, status=1)
    assert "of the cluster: " in said and "model.onnx.data changed" in said
    assert not out.exists() and not (tmp_path / "out.jsonl.journal").exists()


def test_a_cluster_that_is_not_there_or_too_small_is_one_sentence(
    package_fp32: Path, lines: Path, cluster: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    for options, words in (
        (["--ray", nobody], f"there is no Ray cluster at '{nobody}'"),
        (["--ray", "nonsense"], "must be HOST:PORT or auto"),
        (["--ray", cluster, "--threads", "8"], "no machine of the cluster has 8 CPUs"),
        (["--ray", cluster, "--workers", "3"], "room for 2 workers of 1 threads, not 3"),
    ):
        said = run("batch", str(package_fp32), str(lines), out, *options, status=2)
        assert words in said


def test_figures_of_a_cluster_are_those_of_this_machine(
    package: Path, cluster: str, tmp_path: Path
) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 2000, encoding="utf-8")
    source = package.parent / "checkpoint"
    arguments = ["evaluate", str(package), "--reference", str(source), "--text", str(text)]
    arguments += ["--journal", str(tmp_path / "j"), "--json"]
    here = json.loads(run(*arguments))
    there = json.loads(run(*arguments, "--ray", cluster))
    assert here["figures"]["positions"] == there["figures"]["positions"] > 20_000
    for name in ("mean_kl", "perplexity", "same_top1"):
        ours, theirs = here["figures"][name], there["figures"][name]
        assert theirs["value"] == pytest.approx(ours["value"], rel=1e-6)
