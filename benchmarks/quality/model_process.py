"""A worker process, seen from the bench."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from benchmarks.quality.workspace import Workspace

REPOSITORY = Path(__file__).parents[2]


class BrokenPeerError(Exception):
    """A row could not be made or measured; the text is the end of what its process printed."""


def environment(work: Workspace) -> dict[str, str]:
    """The environment of makers and workers: this checkout's modules, no usage reports."""
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUTF8": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "OPENVINO_TELEMETRY": "0",
        "HF_HUB_OFFLINE": "1",
        "LLAMA_CPP_LIBRARY": str(llama_folder(work)),
    }


def llama_folder(work: Workspace) -> Path:
    """Where the libraries of llama.cpp are."""
    return work.venvs / "llama.cpp" / "package" / "bins" / "linux-x64"


class Runnable(Protocol):
    """What can be opened: a row, or a system."""

    @property
    def name(self) -> str:
        """The name of its files."""

    @property
    def runtime(self) -> str:
        """The module of `runtimes` that opens it."""

    def path(self, work: Workspace) -> Path:
        """The folder or file to open."""

    def python(self, work: Workspace) -> Path:
        """The interpreter that runs it."""


class ModelProcess:
    """A model in a process of its own, in the environment of its row."""

    def __init__(self, row: Runnable, work: Workspace, threads: int, *options: str) -> None:
        command = [str(row.python(work)), "-m", "benchmarks.quality.worker", row.runtime]
        command += [str(row.path(work)), "--work", str(work.root), "--threads", str(threads)]
        command += options
        self._log = work.root / "logs" / f"{row.name}.txt"
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env=environment(work),
            )

    def __enter__(self) -> ModelProcess:
        self.load_seconds = float(self._read())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def ask(self, **command: Any) -> Any:
        """Send a command and return its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise BrokenPeerError(last_lines(self._log)) from None
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BrokenPeerError(last_lines(self._log))
        return json.loads(line)


def last_lines(log: Path, count: int = 3) -> str:
    """Return the last lines of a log that are not empty."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return " / ".join([line.strip() for line in lines if line.strip()][-count:])
