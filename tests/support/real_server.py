"""`llama-onnx serve` in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_SECONDS = 120


@dataclass
class Process:
    """A server that listens at `url`; `lines` is what it has said."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def end(self) -> int:
        """Ask it to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(package: Path, options: Sequence[str] = ()) -> Iterator[Process]:
    """Start the command for `package`, wait until it listens, and end it after the block."""
    command = [sys.executable, "-m", "llama_onnx.exporter.cli", "serve", str(package)]
    process = subprocess.Popen(
        [*command, "--port", "0", *options],
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    lines: list[str] = []
    listening = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.rstrip("\n"))
            if "Listening on" in line:
                listening.set()
        listening.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        listening.wait(_SECONDS)
        found = re.search(r"Listening on (http://\S+)", "\n".join(lines))
        assert found, f"the server did not start: {lines}"
        yield Process(found[1], process, lines)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
