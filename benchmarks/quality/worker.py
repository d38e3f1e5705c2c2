"""One model in one process: `python -m benchmarks.quality.worker RUNTIME PATH`.

Reads commands as lines of JSON and answers each with a line of JSON. A peer's worker runs in the
peer's own environment, where only numpy is sure to be installed besides the peer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from benchmarks.quality.figures import Array, measure
from benchmarks.quality.workspace import Workspace

RUNTIMES = ("onnx", "engine", "engine_int8_prompts", "llama_cpp", "openvino", "pytorch")


class Runtime(Protocol):
    """A model that is open."""

    def logits(self, ids: Sequence[int]) -> Array:
        """Return the logits [S, V] of one text."""
        ...

    def answer(self, ids: Sequence[int], most: int, end: int) -> list[int]:
        """Continue a prompt greedily by `most` tokens, or to the token `end`."""
        ...

    def seconds(self, ids: Sequence[int], new: int) -> tuple[float, float]:
        """Return the seconds to the first token of a prompt, and those of `new` further ones."""
        ...


def open_model(name: str, path: Path, threads: int) -> Runtime:
    """Open `path` in runtime `name`."""
    module = importlib.import_module(f"benchmarks.quality.runtimes.{name}")
    opened: Runtime = module.Model(path, threads)
    return opened


def greedy(
    step: Callable[[Sequence[int]], Array], ids: Sequence[int], most: int, end: int
) -> list[int]:
    """Continue `ids` with the likeliest tokens; `step` reads ids and returns the last logits."""
    logits, found = step(ids), list[int]()
    while len(found) < most:
        token = int(np.argmax(logits))
        if token == end:
            break
        found.append(token)
        logits = step([token])
    return found


def main() -> None:
    """Answer commands until the input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("path", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first", action="store_true", help="Answer once before saying so.")
    arguments = parser.parse_args()
    # A library that prints must not print among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    importlib.import_module(f"benchmarks.quality.runtimes.{arguments.runtime}")
    started = time.perf_counter()
    model = open_model(arguments.runtime, arguments.path, arguments.threads)
    if arguments.first:  # some open the model only now
        model.seconds([*range(1, 9)], 1)
    _say(answers, time.perf_counter() - started)
    for line in sys.stdin:
        command = json.loads(line)
        _say(answers, run(model, Workspace(arguments.work), command))


def run(model: Runtime, work: Workspace, command: dict[str, Any]) -> Any:
    """Carry out one command."""
    if command["do"] == "measure":
        reference = np.load(work.reference, mmap_mode="r")
        return measure(reference, np.load(work.tokens), model.logits)
    if command["do"] == "memory":
        return resident()
    if command["do"] == "streams":
        return streams(model, command["prompts"], command["new"])
    if command["do"] == "answer":
        return model.answer(command["ids"], command["most"], command["end"])
    return model.seconds(command["ids"], command["new"])


def streams(model: Runtime, prompts: Sequence[Sequence[int]], new: int) -> float | None:
    """Return the tokens a second of several answers at once; None if the runtime has no way."""
    together = getattr(model, "streams", None)
    return None if together is None else float(together(prompts, new))


def resident() -> dict[str, int]:
    """Return the bytes of memory that this process has: in all, and without mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text("utf-8").splitlines()[1:]
    sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"all": sizes["Rss:"], "own": sizes["Anonymous:"]}


def _say(answers: TextIO, content: Any) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
