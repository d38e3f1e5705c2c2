"""The command `serve`: what it refuses before it listens, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from llama_onnx.exporter.cli import main
from tests.support.http_calls import call
from tests.support.real_server import serving

RUNNING = b'vllm:num_requests_running{engine="0",model_name="m"} 8.0'


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "give a key with --api-key"),
        (["--host", "0.0.0.0", "--api-key", ""], "give a key with --api-key"),
        (["--cache-memory", "3"], "must be a size such as 500MB"),
        (["--cache-memory", "nanGB"], "must be a size such as 500MB"),
        (["--cache-memory", "infGB"], "must be a size such as 500MB"),
        (["--host", "256.0.0.1", "--api-key", "x"], "cannot listen on 256.0.0.1"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--replicas", "0"], "0 is not in the range"),
        (["--most-replicas", "3"], "--most-replicas is for --ray"),
        (["--ray", "auto", "--verify"], "--verify is for this machine"),
        (["--ray", "auto", "--replicas", "3", "--most-replicas", "2"], "must not be less than"),
    ],
)
def test_wrong_options_are_refused(package: Path, options: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["serve", str(package), *options])
    assert result.exit_code == 2
    assert words in result.stderr and "Traceback" not in result.stderr


def test_a_port_in_use_is_refused(package: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["serve", str(package), "--port", port])
    assert result.exit_code == 2
    assert result.stderr.endswith(
        f"cannot listen on 127.0.0.1, port {port}, which another program uses: choose another "
        "--port.\n"
    )


def test_a_package_that_is_none_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(tmp_path), "--port", "0"])
    assert result.exit_code == 1
    assert "manifest.json" in result.stderr and "Traceback" not in result.stderr


def test_without_the_extra_the_command_to_run_is_named(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if ".runtime.serving" in name]:
        monkeypatch.delitem(sys.modules, name)
    result = CliRunner().invoke(main, ["serve", str(package), "--port", "0"])
    assert result.exit_code == 1
    assert '".[cpu,serve]"' in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_it_says_where_it_listens_and_ends_when_asked(package: Path) -> None:
    with serving(package, ["--name", "päckage", "--threads", "1"]) as server:
        with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
            assert [entry["id"] for entry in json.load(answer)["data"]] == ["päckage"]
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
    text = "\n".join(server.lines)
    assert "caches: " in text and "CPUExecutionProvider" in text
    assert "Traceback" not in text


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("end", ["SIGTERM", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_replicas_end_with_their_front_after_the_answers_in_work(package: Path, end: str) -> None:
    options = ["--replicas", "2", "--threads", "1", "--cache-memory", "128MB", "--name", "m"]
    many = 16  # so that a fast machine still writes them when the metrics are read
    fields = {"model": "m", "prompt": "the", "max_tokens": 250, "n": many, "temperature": 1}
    fields |= {"logit_bias": {"2": -100}}
    with serving(package, options) as server, ThreadPoolExecutor(2) as clients:
        replicas = psutil.Process(server.process.pid).children()
        assert len(replicas) == 2
        asked = [clients.submit(call, server.url, "/v1/completions", fields) for _ in range(2)]
        while RUNNING not in call(server.url, "/metrics")[1]:
            assert not any(one.done() for one in asked), asked[0].result()
        server.process.send_signal(getattr(signal, end))
        status = server.process.wait(60)
        if end == "SIGTERM":
            bodies = [json.loads(one.result()[1]) for one in asked]
            written = [body["usage"]["completion_tokens"] for body in bodies]
            assert written == [250 * many, 250 * many]
            assert status == 0
        _, alive = psutil.wait_procs(replicas, 10)
        assert alive == []
    text = "\n".join(server.lines)
    assert text.count("CPUExecutionProvider") == 2 and "Traceback" not in text
