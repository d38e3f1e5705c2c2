"""`bench`: what it measures is what ran, and what it says is what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.bench.bench import bench
from llama_onnx.runtime.bench.contender import Here
from llama_onnx.runtime.bench.timings import SingleRun, Spread
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.memory import resident_bytes
from llama_onnx.targets.errors import UsageError
from tests.support.packages import END, alter_package

OURS = "--engine", "onnxruntime"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


def test_every_figure_by_json(package: Path) -> None:
    started = perf_counter()
    options = ("--prompt-tokens", "40", "--new-tokens", "12", "--repeats", "3", "--threads", "1")
    result = run(package, *options, "--json")
    seconds = perf_counter() - started
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    assert (found["prompt_tokens"], found["new_tokens"], found["repeats"]) == (40, 12, 3)
    assert found["provider"]["onnxruntime"] == "CPUExecutionProvider"
    assert found["threads"] == 1
    for name in ("first_token_seconds", "prefill_rate", "decode_rate"):
        spread = found[name]
        assert 0 < spread["least"] <= spread["median"] <= spread["most"]
    # Three runs, each with a wait for the first token and eleven steps after it, took no longer
    # than the command.
    spent = found["load_seconds"] + 3 * found["first_token_seconds"]["least"]
    assert spent + 3 * 11 / found["decode_rate"]["most"] < seconds
    assert found["first_token_seconds"]["least"] >= 40 / found["prefill_rate"]["most"]
    assert 0 < found["resident"] <= found["peak"] <= psutil.virtual_memory().total


def test_a_table_in_80_columns(package: Path) -> None:
    result = run(package, "--repeats", "2", "--new-tokens", "4")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    # The tiny model's context is 256: half of it for the prompt, not 512.
    assert "int4 · CPUExecutionProvider · prompt 128, answer 4 tokens" in lines[0]
    assert all(len(line) <= 80 for line in lines)
    for name in ("first token", "prefill", "decode", "load (one run)", "peak memory"):
        assert any(line.strip().startswith(name) for line in lines)


def test_one_token_has_no_decode_rate(package: Path) -> None:
    assert bench(package, new_tokens=1, repeats=1).decode_rate is None
    result = run(package, "--new-tokens", "1", "--repeats", "1")
    assert (result.exit_code, "decode" in result.stdout) == (0, False)


def test_the_first_run_only_warms_up(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 1.0, 4.0, 2.0])

    def single(self: Here, prompt_tokens: int, new_tokens: int) -> SingleRun:
        wait = next(seconds)
        return SingleRun(prompt_tokens, wait, (wait, 1.0, 1.0, 1.0))

    monkeypatch.setattr(Here, "single", single)
    measured = bench(package, prompt_tokens=8, new_tokens=4, repeats=3)
    assert measured.first_token_seconds == Spread(4.0, 2.0, 8.0)
    assert measured.prefill_rate == Spread(4.0, 2.0, 8.0)
    assert measured.decode_rate == Spread(1.0, 1.0, 1.0)


def test_an_end_token_ends_no_measurement(package: Path, tmp_path: Path) -> None:
    # Every token is an end token: an answer of `generate` has one token, a measurement all.
    ends = {"eos_token_id": list(range(END, 288))}
    model = Llama.load(alter_package(package, tmp_path / "ends", model=ends))
    answer = model.generate("the quick", max_new_tokens=20)
    list(answer)
    assert answer.stats.new_tokens < 20
    stats = model.measure(np.arange(3, 13, dtype=np.int32), 20)
    assert (stats.prompt_tokens, stats.new_tokens, stats.finish_reason) == (10, 20, "length")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--repeats", "0"), "repeats must be at least 1, not 0"),
        (("--new-tokens", "0"), "new tokens must be at least 1, not 0"),
        (("--prompt-tokens", "250", "--new-tokens", "7"), "more than the context of 256 tokens"),
        (("--prompt-tokens", "0"), "prompt tokens must be at least 1, not 0"),
        (("--prompt-tokens", "-3"), "prompt tokens must be at least 1, not -3"),
        (("--prompt-tokens", "300"), "the context holds 256"),
        (("--threads", "0"), "number of threads must be 1 to"),
        (("--turns", "0"), "turns must be at least 1, not 0"),
        (("--turns", "200"), "a chat of 200 turns does not fit 256 tokens"),
        (("--streams", "1,two"), "such as 1,2,4, not"),
        (
            ("--engine", "genai", "--streams", "2"),
            "onnxruntime-genai generates one answer at a time",
        ),
        ((*OURS, "--streams", "0,1"), "streams must be at least 1, not 0"),
        ((*OURS, "--streams", "9"), "the engine generates at most 8 answers at once"),
        ((*OURS, "--streams", "2", "--new-tokens", "1"), "at least 2 new tokens"),
        (("--against-engine", "genai"), "--against-engine needs --against PACKAGE"),
    ],
)
def test_numbers_that_mean_nothing(package: Path, options: tuple[str, ...], said: str) -> None:
    result = run(package, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_no_package(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert (result.exit_code, result.stdout) == (1, "")
    with pytest.raises(UsageError):
        bench(tmp_path, repeats=-1)


def test_resident_memory_is_that_of_psutil() -> None:
    found, expected = resident_bytes(), psutil.Process().memory_info().rss
    assert found is not None
    assert found[0] == pytest.approx(expected, rel=0.02)
    ballast = np.ones(200_000_000, np.uint8)
    grown, peak = resident_bytes() or (0, 0)
    assert grown == pytest.approx(psutil.Process().memory_info().rss, rel=0.02)
    # Less than all of it: the system may take other pages back meanwhile.
    assert grown - found[0] > ballast.nbytes / 2
    assert peak >= grown
