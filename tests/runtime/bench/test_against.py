"""`bench --against`: two packages in turns, which is faster, and what can go wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.bench import apart
from llama_onnx.runtime.bench import bench as bench_module
from llama_onnx.runtime.bench.apart import Apart
from llama_onnx.runtime.bench.comparison import compare
from llama_onnx.runtime.bench.contender import Opening
from llama_onnx.runtime.bench.timings import Runs, SingleRun, StreamsRun, TurnRun
from llama_onnx.runtime.bench.turns import Script
from llama_onnx.runtime.bench.workload import Workload
from llama_onnx.targets.errors import PackageError, ResourceError
from llama_onnx.targets.progress import SILENT
from tests.support.packages import renew_hashes
from tests.support.terminal import read_until

SMALL = (
    *("--engine", "onnxruntime", "--threads", "1", "--repeats", "2", "--turns", "2"),
    *("--prompt-tokens", "20", "--new-tokens", "4", "--streams", "1,2"),
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


def said(result: Result) -> str:
    """What was printed, without line breaks."""
    return " ".join(result.stdout.split())


def test_both_packages_with_the_same_measurements(package: Path, package_fp32: Path) -> None:
    result = run(package, *SMALL, "--against", package_fp32, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    first: dict[str, Any] = json.loads(result.stdout)
    second = first["against"]
    assert (first["precision"], second["precision"]) == ("int4", "fp32")
    assert second["against"] is None and first["notes"] == []
    for one in (first, second):
        assert [len(run["step_seconds"]) for run in one["runs"]["single"]] == [4, 4]
        assert [row["streams"] for row in one["streams"]] == [1, 2]
        assert [turn["turn"] for turn in one["turns"]] == [1, 2]
        assert 0 < one["resident"] <= one["peak"]
    found = {one["figure"]: one for one in first["comparison"]}
    assert list(found) == [
        *("prefill", "first token", "decode", "token to token, median"),
        *("decode of one stream", "decode of 2 streams"),
        *("first token of turn 1", "first token of turn 2"),
    ]
    pairs = [
        sum(a["step_seconds"][1:]) / sum(b["step_seconds"][1:])
        for a, b in zip(first["runs"]["single"], second["runs"]["single"], strict=True)
    ]
    assert found["decode"]["ratio"]["least"] == pytest.approx(min(pairs))
    assert found["decode"]["ratio"]["most"] == pytest.approx(max(pairs))
    assert found["decode"]["exceeds"] == (min(pairs) > 1 or max(pairs) < 1)


def test_the_same_package_twice_and_another_engine(package: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(package, tmp_path / package.name)
    result = run(package, *SMALL, "--against", copy)
    assert result.exit_code == 0
    assert "Both are the same package in the same engine: what differs is noise." in said(result)
    result = run(package, *SMALL[:-2], "--against", package, "--against-engine", "genai")
    assert result.exit_code == 0
    assert "what differs is noise" not in said(result)
    assert f"{package.name} (genai) ·" in said(result)
    assert "answers at once with onnxruntime-genai" in said(result)
    lines = result.stdout.splitlines()
    (row,) = [line for line in lines if line.strip().startswith("decode of 2 streams")]
    assert row.split()[-1] == "-"
    assert all(len(line) <= 80 for line in lines[2:])
    # The last column was cut off: "speed of sec", and of a ratio its first digits.
    assert "speed of second" in said(result)
    (row,) = [line for line in lines if line.strip().startswith("first token  ")]
    assert re.fullmatch(r"\d+\.\d\d", row.split()[-1])


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("measured something")


@pytest.mark.parametrize("damage", ["absent", "no graph", "no data"])
def test_a_damaged_second_package_is_found_before_anything_is_measured(
    package: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_module, "_measure", never)
    second = tmp_path / "second"
    if damage != "absent":
        shutil.copytree(package, second)
        file = second / ("model.onnx" if damage == "no graph" else "model.onnx.data")
        file.write_bytes(file.read_bytes()[:100])
        renew_hashes(second)
    before = set(psutil.Process().children())
    result = run(package, *SMALL, "--against", second)
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(second) in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert not [one for one in set(psutil.Process().children()) - before if is_child(one)]


def is_child(process: psutil.Process) -> bool:
    """Whether a process has a package open; Python's own, which tracks resources, may stay."""
    return "spawn_main" in " ".join(process.cmdline())


def test_a_process_that_dies_is_an_error(package: Path) -> None:
    with closing(Apart(Opening(package, "onnxruntime", 1, None, False))) as contender:
        assert contender.facts.precision == "int4"
        assert len(contender.single(10, 3).step_seconds) == 3
        contender._process.kill()
        with pytest.raises(ResourceError, match="ended with status -9" if os.name != "nt" else ""):
            contender.single(10, 3)


def test_errors_come_back_as_they_are(package: Path, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="nowhere"):
        Apart(Opening(tmp_path / "nowhere", "onnxruntime", 1, None, False))
    sent: list[Any] = []

    class Pipe:
        def send(self, value: Any) -> None:
            sent.append(value)

        def recv(self) -> Any:
            if len(sent) > 1:
                raise EOFError
            return "single", (300, 10)

    handler = signal.getsignal(signal.SIGINT)
    try:
        apart.serve(Pipe(), Opening(package, "onnxruntime", 1, None, False))  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "more than the context" in str(sent[1])


# What is compared, and in which order


def runs(*rates: float) -> Runs:
    """Runs of 2 tokens whose rates are these, in all figures."""
    return Runs(
        tuple(SingleRun(10, 10 / rate, (0.0, 1 / rate)) for rate in rates),
        tuple((StreamsRun(1, rate, 2, (1 / rate,), 0),) for rate in rates),
        tuple((TurnRun(10, 0, 2, 1 / rate),) for rate in rates),
    )


@pytest.mark.parametrize(
    ("second", "exceeds", "said"),
    [
        (
            (2.2, 2.0, 2.1),
            True,
            "b is 2.10 times as fast as a (2.00 to 2.20), more than the spread",
        ),
        (
            (0.5, 0.4, 0.5),
            True,
            "a is 2.00 times as fast as b (2.00 to 2.50), more than the spread",
        ),
        ((1.1, 0.9, 1.2), False, "no difference beyond the spread: b is 1.10 times as fast as a"),
        ((0.9,), None, "a is 1.11 times as fast as b in the only pair of runs, which says little"),
    ],
)
def test_which_is_faster_and_whether_it_is_the_spread(
    second: tuple[float, ...], exceeds: bool | None, said: str
) -> None:
    found = compare(runs(*[1.0] * len(second)), runs(*second), ("a", "b"), [1])
    assert {one.figure for one in found} >= {"prefill", "decode", "decode of one stream"}
    for one in found:
        assert one.exceeds is exceeds
        assert said in one.sentence and one.sentence.startswith(f"{one.figure}: ")


def test_drift_that_both_share_is_no_spread() -> None:
    (prefill, *_) = compare(runs(1.0, 4.0, 2.0), runs(1.1, 4.4, 2.2), ("a", "b"), [1])
    assert prefill.exceeds is True
    assert prefill.ratio.least == pytest.approx(1.1) == prefill.ratio.most


class Fake:
    """Notes who is asked for what."""

    def __init__(self, name: str, log: list[tuple[str, str]], facts: Any) -> None:
        self._name, self._log, self.facts = name, log, facts

    def single(self, prompt_tokens: int, new_tokens: int) -> SingleRun:
        self._log.append((self._name, "single"))
        return runs(1.0).single[0]

    def streams(self, count: int, prompt_tokens: int, new_tokens: int) -> StreamsRun:
        self._log.append((self._name, f"streams {count}"))
        return runs(1.0).streams[0][0]

    def chat(self, number: int, script: Script) -> tuple[TurnRun, ...]:
        self._log.append((self._name, f"chat {number}"))
        return runs(1.0).turns[0]


def test_packages_take_turns_and_each_is_first_as_often() -> None:
    log: list[tuple[str, str]] = []
    fakes: Any = [Fake(name, log, type("Facts", (), {"capacity": 1})) for name in "ab"]
    workload = Workload(10, 2, 2, (1, 8), Script(1, 1, 1, True, 99), ())
    bench_module._measure(fakes, workload, SILENT)
    what = ["single", "streams 1", "streams 8"]
    assert log == [
        *[("a", "single"), ("b", "single")],  # the warm-up
        *[(name, one) for one in [*what, "chat 1"] for name in "ab"],
        *[(name, one) for one in [*what, "chat 2"] for name in "ba"],
    ]


# Ctrl-C


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a POSIX thing")
@pytest.mark.parametrize("two", [False, True])
def test_ctrl_c_in_the_middle(package: Path, tmp_path: Path, two: bool) -> None:
    page = tmp_path / "page.html"
    against = ["--against", str(package)] if two else []
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "bench", str(package), *SMALL]
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        [*command, "--repeats", "1000000", "--report", str(page), *against],
        stdout=subprocess.PIPE,
        stderr=inside,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(inside)
    try:
        read_until(terminal, rb"measuring")
        children = psutil.Process(process.pid).children(recursive=True)
        assert len([one for one in children if is_child(one)]) == (2 if two else 0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        read_until(terminal, rb"Aborted!")
        stdout, _ = process.communicate(timeout=30)
        assert (process.returncode, stdout) == (130, b"")
        assert not list(tmp_path.iterdir())
        _, alive = psutil.wait_procs(children, 10)
        assert not alive
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
