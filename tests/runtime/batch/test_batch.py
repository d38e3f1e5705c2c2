"""The command `batch`: each line is answered once, in order, whatever dies in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.batch.batch import Started, open_package, run_batch
from llama_onnx.runtime.batch.batch_format import AnsweredLine
from llama_onnx.runtime.batch.lines import Line
from llama_onnx.runtime.batch.local import LocalWorkers
from llama_onnx.runtime.batch.worker import Opening
from llama_onnx.runtime.doctor.child import command_of
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.targets.listing import hash_file
from tests.support.batches import chat_line, failure_of, read_lines, text_of, write_lines
from tests.support.faults import edit

CHAT = [{"role": "user", "content": "the lazy dog"}]


def run(package: Path, source: Path, out: Path, *options: str) -> Any:
    given = ["batch", str(package), str(source), str(out), "--workers", "1", "--threads", "1"]
    return CliRunner().invoke(main, [*given, "--cache-memory", "64MB", *options])


@pytest.fixture(scope="module")
def model(package_fp32: Path) -> Iterator[Llama]:
    with Llama.load(package_fp32, engine="onnxruntime", threads=1) as model:
        yield model


def test_answers_are_those_of_the_model_and_each_failure_is_on_its_line(
    package_fp32: Path, model: Llama, tmp_path: Path
) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        [
            chat_line("chat", "the lazy dog"),
            '{"prompt": "the quick", "max_tokens": 5}',
            "{broken",
            "",
            '{"messages": "no list"}',
            '{"prompt": "%s"}' % ("the fox " * 400),
            chat_line("stream", "x", stream=True),
            chat_line("model", "x", model="gpt-4o"),
            chat_line("chat", "the lazy dog", model="tiny-fp32", n=2),
            '{"prompt": "the", "unknown": 1}',
            '{"messages": [{"role": "user", "content": "a"}], "temperature": -1}',
        ],
    )
    result = run(package_fp32, source, tmp_path / "out.jsonl", "--json")
    assert result.exit_code == 0, result.output
    found = read_lines(tmp_path / "out.jsonl")
    assert [line["custom_id"] for line in found] == [
        *("chat", None, None, None, None, "stream", "model", "chat", None, None)
    ]
    chat, plain, *_ = found
    assert text_of(chat) == "".join(model.chat(CHAT, max_new_tokens=6)) != ""
    assert text_of(plain) == "".join(model.generate("the quick", max_new_tokens=5)) != ""
    assert chat["response"]["status_code"] == 200 and chat["error"] is None
    assert len(found[7]["response"]["body"]["choices"]) == 2
    failures = {number: failure_of(found[number]) for number in (2, 3, 4, 5, 6, 8, 9)}
    assert {number: status for number, (status, _) in failures.items()} == {
        2: None,
        3: 400,
        4: 400,
        5: 400,
        6: 404,
        8: 400,
        9: 400,
    }
    for number, words in {
        2: "not valid JSON",
        3: "messages",
        4: "context",
        5: "stream",
        6: "gpt-4o",
        8: "unknown",
        9: "temperature",
    }.items():
        assert words in failures[number][1], number
    summary = json.loads(result.stdout)
    assert (summary["lines"], summary["errors"], summary["reused"]) == (10, 7, 0)
    assert summary["first_error"] == 3
    assert summary["repeated_ids"] == 1
    usage = [line["response"]["body"]["usage"] for line in (chat, plain, found[7])]
    assert summary["new_tokens"] == sum(entry["completion_tokens"] for entry in usage)
    assert summary["prompt_tokens"] == sum(entry["prompt_tokens"] for entry in usage)
    assert not (tmp_path / "out.jsonl.journal").exists()


def test_a_line_whose_logits_are_nan_costs_no_other(
    package_fp32: Path, model: Llama, tmp_path: Path
) -> None:
    import shutil

    package = Path(shutil.copytree(package_fp32, tmp_path / "tiny-fp32"))
    (poison,) = (int(token) for token in model.encode("~"))
    edit(package, "model.embed_tokens.weight", lambda rows: rows.__setitem__(poison, float("nan")))
    source = write_lines(tmp_path / "in.jsonl", [chat_line(t, t) for t in ("the", "~", "dog")])
    result = run(package, source, tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert "3 lines; 1 error, in line 2." in result.stderr
    good, bad, other = read_lines(tmp_path / "out.jsonl")
    status, message = failure_of(bad)
    assert status == 500 and "not a number" in message and str(tmp_path) not in message
    for line, text in ((good, "the"), (other, "dog")):
        expected = model.chat([{"role": "user", "content": text}], max_new_tokens=6)
        assert text_of(line) == "".join(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cache-memory", "3"], "--cache-memory must be a size"),
        (["--workers", "0"], "not in the range"),
        (["--ray", "nonsense"], "ray"),
    ],
)
def test_wrong_options_are_one_sentence(
    package_fp32: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}'])
    result = run(package_fp32, source, tmp_path / "out.jsonl", *options)
    assert result.exit_code in (1, 2) and words in result.stderr
    assert "Traceback" not in result.stderr


def test_files_are_checked_before_anything_runs(package_fp32: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ['{"prompt": "a"}'])
    for out, words in (
        (source, "is the input"),
        (tmp_path / "no" / "out.jsonl", "a folder that exists"),
        (tmp_path, "must be a file"),
        (write_lines(tmp_path / "old.jsonl", ["kept"]), "exists: give another name"),
    ):
        result = run(package_fp32, source, out)
        assert result.exit_code == 2 and words in result.stderr
    assert (tmp_path / "old.jsonl").read_text() == "kept\n"
    result = run(tmp_path, source, tmp_path / "out.jsonl")
    assert result.exit_code == 1 and "manifest.json" in result.stderr


def test_without_the_extra_the_command_to_run_is_named(
    package_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["openai", *(n for n in sys.modules if n.startswith("openai."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [n for n in sys.modules if ".runtime.batch" in n or ".runtime.serving" in n]:
        monkeypatch.delitem(sys.modules, name)
    result = run(package_fp32, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert result.exit_code == 1 and '".[cpu,batch]"' in result.stderr


def opening(package: Path, **fields: Any) -> Opening:
    sha256 = hash_file(package / "manifest.json")
    values = {"rows": 2, "threads": 1, "cache_bytes": 32 << 20, **fields}
    return Opening(str(package), sha256, **values)


def test_lines_of_a_killed_worker_are_answered_by_others_once(package_fp32: Path) -> None:
    lines = [(n, chat_line(str(n), f"the {n}", max_tokens=40).encode()) for n in range(30)]
    answered: list[int] = []
    with LocalWorkers(opening(package_fp32), 2) as workers:
        workers.start()
        for number, content in workers.answer(iter(lines)):
            answered.append(number)
            assert json.loads(content.split(b" ", 3)[3])["custom_id"] == str(number)
            if len(answered) in (3, 12):
                os.kill(workers.pids[len(answered) % 2], signal.SIGKILL)
        deaths = workers.deaths
    assert sorted(answered) == list(range(30))
    assert deaths == 2


@pytest.mark.slow
def test_a_line_that_kills_every_worker_gets_an_error(
    package_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's process imports a module that kills it at a certain prompt."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.abc, os\n"
        "def watch():\n"
        "    from llama_onnx.runtime.batch import worker\n"
        "    real = worker.read_line\n"
        "    def read(text):\n"
        "        if b'poison' in text: os.kill(os.getpid(), 9)\n"
        "        return real(text)\n"
        "    worker.read_line = read\n"
        "sys.modules['llama_onnx_test_watch'] = watch\n",
        encoding="utf-8",
    )
    from llama_onnx.runtime.batch import process

    def watched(*arguments: str, first: str = "") -> list[str]:
        command = command_of(*arguments, first=first)
        start = command[2].replace("from llama", "import sitecustomize; from llama", 1)
        command[2] = start.replace("main()", "sys.modules['llama_onnx_test_watch'](); main()")
        return command

    monkeypatch.setattr(process, "command_of", watched)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = [(n, chat_line(str(n), "poison" if n == 4 else "the").encode()) for n in range(9)]
    with LocalWorkers(opening(package_fp32), 1) as workers:
        workers.start()
        found = dict(workers.answer(iter(lines)))
        deaths = workers.deaths
    assert sorted(found) == list(range(9)) and deaths == 3
    failed = {number for number, content in found.items() if content.startswith(b"1 ")}
    assert failed == {4}
    output = json.loads(found[4].split(b" ", 3)[3])
    assert output["custom_id"] == "4" and output["error"]["code"] == "worker_died"
    assert "SIGKILL" in output["error"]["message"]


def test_another_package_at_the_same_place_is_refused(package_fp32: Path) -> None:
    from llama_onnx.targets.errors import PackageError

    with (
        LocalWorkers(Opening(str(package_fp32), "0" * 64), 1) as workers,
        pytest.raises(PackageError, match="differs from the package that the batch began with"),
    ):
        workers.start()


def test_a_run_that_replaces_goes_on_without_force(package_fp32: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [chat_line("a", "the"), chat_line("b", "dog")])
    out = tmp_path / "out.jsonl"
    out.write_text("stale")
    package, sha256 = open_package(package_fp32)
    opening = Opening(str(package.path), sha256, "tiny")

    @contextmanager
    def dies(*_: Any) -> Iterator[Started]:
        yield Started(1, 1, one_answer)

    def one_answer(_: bytearray) -> Iterator[Line]:
        yield 0, AnsweredLine(b'{"custom_id": "a"}').to_bytes()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(opening, source, out, dies, force=True)
    assert out.read_text() == "stale"
    result = run(package_fp32, source, out, "--json", "--name", "tiny")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["reused"] == 1
    assert [line["custom_id"] for line in read_lines(out)] == ["a", "b"]
    assert run(package_fp32, source, out).exit_code == 2  # OUT is there again


def test_the_input_is_never_the_journal(package_fp32: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "out.jsonl.journal", [chat_line("a", "the")])
    before = source.read_bytes()
    result = run(package_fp32, source, tmp_path / "out.jsonl", "--force")
    assert result.exit_code == 2 and "is the input" in result.stderr
    assert source.read_bytes() == before


def started(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "batch", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_after_a_kill_of_the_driver_the_same_command_goes_on(
    package_fp32: Path, tmp_path: Path
) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        [chat_line(str(n), f"the {n}", max_tokens=150, logit_bias={"2": -100}) for n in range(40)],
    )
    out, journal = tmp_path / "out.jsonl", tmp_path / "out.jsonl.journal"
    options = ["--workers", "1", "--threads", "1", "--rows", "2", "--cache-memory", "64MB"]
    arguments = [str(package_fp32), str(source), str(out), *options]
    process = started(arguments)
    deadline = time.monotonic() + 300
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = journal.read_bytes()
    known = before.count(b"\n") - 1
    assert known < 40 and not out.exists()

    second = started([*arguments, "--json"])
    said, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    summary = json.loads(said)
    assert summary["reused"] >= known and summary["lines"] == 40
    found = read_lines(out)
    assert [line["custom_id"] for line in found] == [str(n) for n in range(40)]
    # What was finished is the same bytes, its id included: nothing was answered again.
    kept = [line.split(b" ", 5)[5] for line in before.splitlines()[1 : known + 1]]
    assert set(kept) <= set(out.read_bytes().splitlines())

    third = started(arguments)
    _, errors = third.communicate(timeout=300)
    assert third.returncode == 2 and b"exists" in errors
