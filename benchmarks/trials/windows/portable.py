"""A zip file with llama-onnx for Windows and the Python that it needs, tried under Wine.

python -m benchmarks.trials.windows.portable WORK_FOLDER

Writes WORK_FOLDER/llama-onnx-windows.zip: unpack it anywhere and run llama-onnx.cmd; nothing is
installed. It has what `pip install "llama-onnx[cpu,serve,batch]"` has, for finished packages: no
torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.trials.windows.windows_python import PROMPT, make_certified, make_python
from benchmarks.trials.windows.wine import Wine, check_tools, windows_path
from llama_onnx.runtime.bundles.wheel_libraries import download_wheels
from tests.support.tables import Case, markdown

NAME = "llama-onnx-windows"
# llguidance, which `cpu` has too, and the extra `serve`; click asks for colorama on Windows alone.
MORE = ("llguidance", "fastapi", "h11", "openai", "prometheus-client", "uvicorn", "colorama")
_LEFT_OVERS = ("from", "python.c", "python3.def")

_FEW = {"max_tokens": 40, "temperature": 0}
_CHAT = {"messages": [{"role": "user", "content": "Größe in 日本?"}], **_FEW}
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": {"enum": ["yes", "no"]}, "strict": True},
}
ASKED = (
    ("a text", "/v1/completions", {"prompt": PROMPT, **_FEW}),
    ("a chat", "/v1/chat/completions", _CHAT),
    ("a JSON schema", "/v1/chat/completions", {**_CHAT, "response_format": _SCHEMA}),
)

_COMMAND = r"""@echo off
rem UTF-8 for files and pipes; the console itself gets UTF-16 from Python.
setlocal
set "PYTHONHOME=%~dp0python"
set "PYTHONPATH="
set "PYTHONUTF8=1"
"%~dp0python\python.exe" -m llama_onnx.exporter.cli %*
exit /b %ERRORLEVEL%
"""


def main() -> None:
    """Make the zip file, unpack it in a folder with an awkward name, and run it there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work.resolve()
    check_tools()
    packed = make_zip(work)
    place = work / "ä ü 日本"
    shutil.rmtree(place, ignore_errors=True)
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(place)
    package = make_certified(work / "package ä 日本")
    wine = Wine.make(work / "wine")
    try:
        done = list(cases(wine, place / NAME / "llama-onnx.cmd", package))
    finally:
        wine.close()
    print(f"{packed}: {packed.stat().st_size / 1e6:.0f} MB")
    print(markdown("portable zip, under Wine | what happened", done))
    sys.exit(not all(case.holds for case in done))


def make_zip(work: Path) -> Path:
    """Assemble the folder and pack it."""
    folder = work / NAME
    shutil.rmtree(folder, ignore_errors=True)
    wheels = work / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    download_wheels(wheels)
    make_python(folder / "python", wheels, more=MORE)
    for name in _LEFT_OVERS:
        left = folder / "python" / name
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    # cmd.exe reads a file with the line ends of Unix wrongly.
    (folder / "llama-onnx.cmd").write_bytes(_COMMAND.replace("\n", "\r\n").encode())
    return Path(shutil.make_archive(str(folder), "zip", work, NAME))


def cases(wine: Wine, command: Path, package: Path) -> Iterator[Case]:
    """Run the commands that a user tries first, and compare with this machine."""
    here = [sys.executable, "-m", "llama_onnx.exporter.cli"]
    said = call(wine, command, "--help")
    yield Case("--help", "Turn a Llama checkpoint" in said, said.splitlines()[0])
    report = json.loads(call(wine, command, "verify", windows_path(package), "--json"))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield Case("verify", report["passed"] is True, versions)
    options = ("--max-new-tokens", "40", "--json")
    said = call(wine, command, "generate", windows_path(package), PROMPT, *options)
    expected = subprocess.run(
        [*here, "generate", str(package), PROMPT, *options], capture_output=True, check=True
    )
    same = json.loads(said.splitlines()[-1])["text"] == json.loads(expected.stdout)["text"]
    yield Case("generate, folders ä ü 日本", same, "the text of Linux" if same else said)
    done = wine.call(cmd(command, "generate", "C:\\nothing", "hi"), pipes=True)
    error = done.stderr.decode(errors="replace").strip()
    yield Case("a package that is not there", done.returncode == 1 and "Error" in error, error)
    yield from served(wine, command, package)


def served(wine: Wine, command: Path, package: Path) -> Iterator[Case]:
    """Start the server under Wine and here, and ask both the same."""
    here = [sys.executable, "-m", "llama_onnx.exporter.cli"]
    there = ["wine", *cmd(command)]
    with (
        server([*there, "serve", windows_path(package)], wine.environment()) as windows,
        server([*here, "serve", str(package)], dict(os.environ)) as linux,
    ):
        for name, path, body in ASKED:
            body = {"model": package.name, **body}
            got, expected = (ask(port, path, body) for port in (windows, linux))
            same = got == expected
            yield Case(f"serve: {name}", same, "the answer of Linux" if same else repr(got))
        models = json.loads(fetch(windows, "/v1/models"))["data"]
        yield Case("serve: /v1/models", models[0]["id"] == package.name, models[0]["id"])


@contextmanager
def server(command: list[str], environment: dict[str, str]) -> Iterator[int]:
    """Run `serve` with a free port, which is yielded once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    threading.Thread(target=process.stdout.read, daemon=True).start()  # type: ignore[union-attr]
    try:
        for _ in range(240):
            with suppress(OSError):
                fetch(port, "/health")
                break
            time.sleep(0.5)
        yield port
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(port: int, path: str, body: dict[str, Any]) -> str:
    """Return the text of the answer."""
    request = json.dumps(body).encode()
    (choice,) = json.loads(fetch(port, path, request))["choices"]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def fetch(port: int, path: str, body: bytes | None = None) -> bytes:
    """Return what the server at `port` answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        content: bytes = reply.read()
    return content


def call(wine: Wine, command: Path, *arguments: str) -> str:
    """Return the output of llama-onnx.cmd."""
    done = wine.call(cmd(command, *arguments), environment={"COLUMNS": "100"}, pipes=True)
    text = done.stdout.decode(errors="replace").replace("\r", "")
    return text or done.stderr.decode(errors="replace")


def cmd(command: Path, *arguments: str) -> list[str]:
    """Return the call of a .cmd file, which only cmd.exe can run."""
    # Without `call`, cmd.exe takes the first and the last quote of the line away.
    return ["cmd", "/c", "call", windows_path(command), *arguments]


if __name__ == "__main__":
    main()
