"""Run the model's process for a server: queue requests, and refuse those beyond a limit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import BoundedSemaphore, Lock
from typing import Any

from llama_onnx.runtime.serving.request import Request
from llama_onnx.targets.errors import (
    BusyError,
    LlamaOnnxError,
    PackageError,
    TooLargeError,
    UsageError,
)
from llama_onnx.targets.package import MANIFEST

MAX_WAITING = 8
"""Requests that may wait; further ones are refused."""

_PATH = re.compile(
    r"""(?<![\w.:/\\])(?:/(?:[^\s/:'",]+/)+|[A-Za-z]:\\(?:[^\\:'",]+\\)*)(?P<last>[^\s/\\:'",]+)"""
)
"""An absolute path of two parts or more, and its last part."""


class Service:
    """A package that answers one request at a time; others wait, in no particular order.

    `about` has the model's name and its provider. A process that has ended is restarted before the
    next answer.
    """

    def __init__(self, package: Path, *, max_waiting: int = MAX_WAITING) -> None:
        """Open `package`; raise `LlamaOnnxError` if its provider cannot run it."""
        self._package = package
        self._turn = Lock()
        self._room = BoundedSemaphore(max_waiting + 1)
        self._process, self.about = _open(package)

    def __str__(self) -> str:
        """Return the model, its process, and how its provider was verified."""
        provider = self.about["provider"]
        return f"{self.about['model']} (process {self._process.pid}): {provider['verified']}"

    def answer(self, request: Request) -> dict[str, Any]:
        """Return the whole answer: `text` and `stats`.

        Raises `UsageError`, `BusyError`, or `LlamaOnnxError` if the answer fails.
        """
        messages = list(self.stream(request))
        text = "".join(message["text"] for message in messages[:-1])
        return {"text": text, **messages[-1]}

    def stream(
        self, request: Request, handle: Handle | None = None
    ) -> Generator[dict[str, Any], None, None]:
        """Return the answer in pieces, each a `text`, with `stats` at the end.

        Waits for its turn, and raises immediately what `answer` would raise before the first piece.
        `close()` ends the answer early; so does another thread with `handle`.
        """
        messages = self._ask(request, handle or Handle())
        next(messages)
        return messages

    def public(self, error: LlamaOnnxError) -> str:
        """Return an error's sentence for a caller: it names the model, not where it is."""
        text = str(error)
        for path in {str(self._package), str(self._package.resolve())}:
            text = text.replace(path, self._package.resolve().name)
        return _PATH.sub(lambda match: match["last"], text)

    def close(self) -> None:
        """End the model's process."""
        self._process.communicate()

    @contextmanager
    def _take_turn(self) -> Iterator[None]:
        if not self._room.acquire(blocking=False):
            raise BusyError("too many requests are waiting: try again later.")
        try:
            with self._turn:
                yield
        finally:
            self._room.release()

    def _ask(self, request: Request, handle: Handle) -> Generator[dict[str, Any], None, None]:
        with self._take_turn():
            if self._process.poll() is not None:
                self._process, self.about = _open(self._package)
            message: dict[str, Any] = {}
            handle.begin(self._process, request)
            try:
                while not _is_last(message):
                    message = _receive(self._process)
                    if "error" in message:
                        raise _error(message)
                    yield message
            finally:
                handle.finish()
                if not _is_last(message):
                    _stop(self._process)


class Handle:
    """Lets another thread end an answer, also while its prompt is read or it waits for its turn."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ended = False

    def begin(self, process: subprocess.Popen[str], request: Request) -> None:
        """Send `request`; raise `BusyError` if the answer has been ended before its turn came."""
        with self._lock:
            if self._ended:
                raise BusyError("the caller has left.")
            _send(process, request.to_json())
            self._process = process

    def finish(self) -> None:
        """Say that the answer is over: `end` does nothing from now on."""
        with self._lock:
            self._process = None

    def end(self) -> None:
        """End the answer before its next token; does nothing if it is over."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                with suppress(LlamaOnnxError):  # the process has ended, and the answer with it
                    _send(self._process, None)


def find_package(folder: Path) -> Path:
    """Return the package that `folder` is or contains; raise `PackageError` unless there is one."""
    places = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    found = [path for path in places if (path / MANIFEST).is_file()]
    if len(found) != 1:
        raise PackageError(
            f"{folder} must be a package or contain exactly one, but {len(found)} were found: "
            f"put one package, with its {MANIFEST}, there."
        )
    return found[0]


def http_status(error: LlamaOnnxError) -> int:
    """Return the HTTP status: 400 or 413 for the caller's mistake, 503 when busy, otherwise 500."""
    if isinstance(error, TooLargeError):
        return 413
    if isinstance(error, UsageError):
        return 400
    return 503 if isinstance(error, BusyError) else 500


def _open(package: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start the model's process and wait until it has opened `package`."""
    # The child must find the same modules as this process.
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-m", "llama_onnx.runtime.serving.worker", str(package)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={
            "ORT_DISABLE_TELEMETRY": "1",
            **os.environ,
            "PYTHONPATH": path,
            "PYTHONIOENCODING": "utf-8",
        },
    )
    message = _receive(process)
    if "error" in message:
        process.communicate()
        raise _error(message)
    return process, message["ready"]


def _send(process: subprocess.Popen[str], content: Any) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(content) + "\n")
        process.stdin.flush()
    except OSError:
        raise _ended(process) from None


def _receive(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise _ended(process)
    message: dict[str, Any] = json.loads(line)
    return message


def _stop(process: subprocess.Popen[str]) -> None:
    """End the current answer, if it is still in progress."""
    try:
        _send(process, None)
        while not _is_last(_receive(process)):
            pass
    except LlamaOnnxError:
        pass  # the process has ended, and the answer with it


def _is_last(message: dict[str, Any]) -> bool:
    return "stats" in message or "error" in message


def _error(message: dict[str, Any]) -> LlamaOnnxError:
    return (UsageError if message["usage"] else LlamaOnnxError)(message["error"])


def _ended(process: subprocess.Popen[str]) -> LlamaOnnxError:
    return LlamaOnnxError(
        f"the model's process ended with status {process.wait()}: see its log; -9 usually "
        "means that memory ran out."
    )
