"""Keep a replica running: a thread that starts its process, and another when that ends."""

from __future__ import annotations

import http.client
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from time import monotonic
from typing import Any

from llama_onnx.runtime.batch.process import failure
from llama_onnx.runtime.doctor.child import command_of, how_ended
from llama_onnx.runtime.serving.serving_spec import ServingSpec
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError, describe_reason

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0
"""Seconds before a process is started again; twice as long each time, while it soon ends."""

SOON = 60.0
"""A process that ran longer did not end soon."""

LOOK_SECONDS, LOOK_PATIENCE, MOST_SILENT = 5.0, 10.0, 3
"""How often a process is asked whether it is healthy, how long that may take, and how many times
in a row it may not answer before it is ended."""

_CHILD = "llama_onnx.runtime.serving.replicas.child_server"

log = logging.getLogger("llama_onnx.serve")


@dataclass(frozen=True)
class Up:
    """A replica that answers at `port`, and what it has said about its model."""

    port: int
    pid: int
    model: str
    provider: str
    fallback: str | None
    tuned: str | None


class Keeper:
    """One replica. `up` is None while it does not answer, `restarts` how often it started again."""

    def __init__(self, number: int, spec: ServingSpec, key: str) -> None:
        self.number, self.up, self.restarts = number, None, 0
        self._given = json.dumps({"number": number, "spec": spec.to_json(), "key": key})
        self._changed: Callable[[Keeper], None] = lambda _: None
        self._first: SimpleQueue[LlamaOnnxError | None] = SimpleQueue()
        self._ending = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True)

    up: Up | None

    def start(self) -> None:
        """Start the process, without waiting for it."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until the process answers; raise why it does not."""
        if (error := self._first.get()) is not None:
            raise error

    def listen(self, changed: Callable[[Keeper], None]) -> None:
        """Call `changed`, in another thread, whenever `up` changes, and now."""
        self._changed = changed
        changed(self)

    def close(self) -> None:
        """End the process and the thread."""
        self._ending.set()
        if self._process is not None:
            self._process.kill()
        if self._thread.is_alive():
            self._thread.join()

    def _keep(self) -> None:
        delay = FIRST_DELAY
        while not self._ending.is_set():
            began = monotonic()
            reason = self._run_once()
            if self._ending.is_set():
                return
            if monotonic() - began > SOON:
                delay = FIRST_DELAY
            log.warning("replica %d %s: it starts again in %g s", self.number, reason, delay)
            self._ending.wait(delay)
            delay = min(2 * delay, LONGEST_DELAY)
            self.restarts += 1

    def _run_once(self) -> str:
        """Run a process to its end, and return how that came."""
        try:
            started = self._start()
        except OSError as problem:  # no memory for a process, or too many of them
            reason = describe_reason(problem)
            self._first.put(ResourceError(f"replica {self.number} cannot be started: {reason}."))
            return f"cannot be started: {reason}"
        with started as process:
            self._process = process
            if self._ending.is_set():
                process.kill()
            said = self._hear(process)
            if "error" in said:
                error = failure(json.dumps(said["error"]).encode())
                self._first.put(error)
                return f"cannot start: {str(error).rstrip('.')}"
            if not said:
                how = how_ended(process.wait())
                self._first.put(ResourceError(f"replica {self.number} {how} before it answered."))
                return f"{how} before it answered"
            self._set(Up(pid=process.pid, **said))
            self._first.put(None)
            try:
                silent = self._watch(process, said["port"])
            finally:
                self._set(None)
            return "did not answer and was ended" if silent else how_ended(process.wait())

    def _start(self) -> subprocess.Popen[str]:
        # In a group of its own: Ctrl-C is for the front, which lets answers in work finish.
        apart: dict[str, Any] = {"start_new_session": True}
        if sys.platform == "win32":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command_of(_CHILD), stdin=pipe, stdout=pipe, encoding="utf-8", **apart
        )

    def _hear(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Tell a process what to serve, and return what it says; nothing if it ended."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(self._given + "\n")
            process.stdin.flush()
            said: dict[str, Any] = json.loads(process.stdout.readline() or "{}")
        except (OSError, ValueError):  # it ended in the middle
            return {}
        return said

    def _watch(self, process: subprocess.Popen[str], port: int) -> bool:
        """Return when a process has ended; True if it had to be ended."""
        silent = 0
        while silent < MOST_SILENT:
            try:
                process.wait(LOOK_SECONDS)
                return False
            except subprocess.TimeoutExpired:
                silent = 0 if answers(port) else silent + 1
        process.kill()
        return True

    def _set(self, up: Up | None) -> None:
        self.up = up
        self._changed(self)


def answers(port: int) -> bool:
    """Whether a replica answers at all; what it says of its engine is its own business."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LOOK_PATIENCE)
    try:
        connection.request("GET", "/health")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def start_all(keepers: Sequence[Keeper]) -> None:
    """Start all replicas at once and wait until each answers; raise why one does not."""
    for keeper in keepers:
        keeper.start()
    for keeper in keepers:
        keeper.wait()
