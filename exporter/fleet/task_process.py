"""A task in a process of its own: whatever ends it costs one row of the report.

The process writes lines of JSON: what it is doing, and at the end what it made or why not. It ends
at once when its driver is gone, and leaves Ctrl-C to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_onnx.exporter.fleet.make_package import Order, from_json, make, to_json
from llama_onnx.exporter.fleet.task_record import FOLDER_NAME
from llama_onnx.runtime.doctor.child import DEAF, command_of, how_ended, take_stdout
from llama_onnx.targets.errors import LlamaOnnxError, describe_reason
from llama_onnx.targets.printable import printable
from llama_onnx.targets.progress import Unit

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_INTERVAL = 0.2  # seconds between two reports of progress


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a `result`, or a `reason`. `died`: it did not say so itself, and may
    be tried again."""

    stages: tuple[str, ...] = ()
    result: dict[str, Any] | None = None
    reason: str = ""
    died: bool = False


class Child:
    """A process that does an order."""

    def __init__(self, order: Order) -> None:
        """Start it; what libraries print goes to a file beside the task's record."""
        threads = dict.fromkeys(_THREADS, str(order.threads))
        self._log = order.out / FOLDER_NAME / f"{order.task.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command_of(__name__, to_json(order), first=DEAF),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **threads},
            )

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def wait(self, tell: Callable[[str], None] = lambda _: None) -> Outcome:
        """Return how it ended; `tell` gets what it is doing meanwhile."""
        outcome = None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said = json.loads(line)  # of our own process
            except ValueError:  # it ended in the middle
                continue
            if "doing" in said:
                tell(said["doing"])
            else:
                outcome = Outcome(tuple(said.get("stages", ())), said["result"], said["reason"])
        code = self._process.wait()
        self._close()
        if outcome is not None:
            self._log.unlink(missing_ok=True)
            return outcome
        return Outcome(reason=f"its process {how_ended(code)}{self._last_words()}.", died=True)

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f" after saying: {lines[-1][:300].rstrip('.')}" if lines else ""


class _Said:
    """Progress as lines for the driver."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self._say, self._last, self._what = say, 0.0, ""

    def step(self, what: str) -> None:
        """Report that `what` begins."""
        self.update(what, 0, 0)

    def update(self, what: str, done: int, total: int, unit: Unit = "steps") -> None:
        """Report how far `what` is, not more often than anyone can read."""
        now = time.monotonic()
        if what == self._what and now - self._last < _INTERVAL:
            return
        self._last, self._what = now, what
        share = f" {100 * done // total} %" if total else ""
        self._say({"doing": f"{what}{share}"})


def main() -> None:
    """Do the order in the first argument."""
    out = os.fdopen(take_stdout(), "w", encoding="utf-8")
    lock = threading.Lock()

    def say(content: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(content) + "\n")
            out.flush()

    threading.Thread(target=_end_with_driver, daemon=True).start()
    order = from_json(sys.argv[1])
    try:
        made = make(order, _Said(say))
    except LlamaOnnxError as error:
        say({"result": None, "reason": printable(str(error))})
    except Exception as error:
        reason = f"it failed unexpectedly: {type(error).__name__}: {describe_reason(error)}."
        say({"result": None, "reason": printable(reason)})
    else:
        say({"stages": made.stages, "result": made.result, "reason": ""})


def _end_with_driver() -> None:
    # At the end of stdin nobody waits for the result any more.
    while os.read(0, 1024):
        pass
    os._exit(1)
