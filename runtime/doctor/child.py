"""Run a program in a separate process, with a time limit; it may crash."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from llama_onnx.runtime.doctor.probe import MARK

DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
"""The first statements of a process that leaves Ctrl-C to its driver."""


@dataclass(frozen=True)
class Outcome:
    """What a program printed, and how it ended: `error` is None if it succeeded."""

    stdout: str
    error: str | None

    def answer(self, mark: str) -> dict[str, Any] | None:
        """Return the JSON object in the last line that begins with `mark`, None without one."""
        for line in reversed(self.stdout.splitlines()):
            if line.startswith(mark):
                answer: dict[str, Any] = json.loads(line.removeprefix(mark))
                return answer
        return None


def run_probe(*arguments: str, seconds: float) -> dict[str, Any]:
    """Return what `probe` finds in a separate process: `{"error": ...}` if it crashes or hangs."""
    outcome = run(command_of("llama_onnx.runtime.doctor.probe", *arguments), seconds=seconds)
    return outcome.answer(MARK) or {"error": outcome.error or "it ended without an answer"}


def command_of(module: str, *arguments: str, first: str = "") -> list[str]:
    """Return the command that calls `main()` of `module`, whose `sys.argv` has the `arguments`, in
    a Python of its own, after the statements `first`.

    That Python gets this one's sys.path: `-m` would put the current folder first, where a folder
    called onnxruntime would hide the installed one.
    """
    path = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    start = f"{first}{path}from {module} import main; main()"
    return [sys.executable, "-c", start, json.dumps(sys.path), *arguments]


def take_stdout() -> int:
    """Return a descriptor of stdout for what this process has to say; what libraries print goes to
    stderr from now on."""
    own = os.dup(1)
    os.dup2(2, 1)
    return own


def how_ended(code: int) -> str:
    """Return how a process with this exit status ended, in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"


def run(command: Sequence[str], *, seconds: float) -> Outcome:
    """Run `command` for at most `seconds`, and return its output and how it ended."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # as _text reads it
    # Files instead of pipes, which a background process started by a driver would hold open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment
            )
        except OSError as error:
            return Outcome("", f"{command[0]} cannot be started: {error.strerror}")
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            # A process stuck in a driver cannot be killed; do not wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            return Outcome("", f"no answer within {seconds:g} s")
        stdout, stderr = _text(out), _text(errors)
    return Outcome(stdout, _error(code, stdout, stderr))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def _error(code: int, stdout: str, stderr: str) -> str | None:
    if code == 0:
        return None
    lines = (stderr.strip() or stdout.strip()).splitlines()
    said = f": {lines[-1].strip()}" if lines else ""
    return f"{_how(code)}{said}"


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it crashes ({signal.Signals(-code).name})"
    # Windows' exceptions are numbers such as 0xC0000005, an access violation.
    return f"it crashes (0x{code:X})" if code > 0xFFFF else f"it ends with exit status {code}"
