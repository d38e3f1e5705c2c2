"""Kill an export several times, resume it, and compare the result with an uninterrupted one.

    python benchmarks/make_checkpoint.py 13b work/13b --sparse
    python benchmarks/kills.py work/13b [--kills 5] [--seed 0] [-- options of export]

The first kill comes before the first weight is written, the last after the last weight, while the
package is tested, and the others at random places among the weights. SIGKILL, so that the process
cannot clean up. Needs disk space of twice the package's size next to the source.
"""

from __future__ import annotations

import argparse
import filecmp
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DATA_FILE = "model.onnx.data"
POLL = 0.005


@dataclass(frozen=True)
class Times:
    """Seconds from the start of an export to its first weight, its last weight, and its end."""

    first: float
    last: float
    end: float
    data_bytes: int


@dataclass(frozen=True)
class Moment:
    """When to kill a running export."""

    what: str
    due: Callable[[State], bool]


@dataclass(frozen=True)
class State:
    """The progress of a run: seconds since its start, bytes of weights written, seconds since the
    last weight (negative before it)."""

    seconds: float
    size: int
    after: float


class Export:
    """A running `llama-onnx export`, watched by the size of its data file."""

    def __init__(self, source: Path, out: Path, options: list[str]) -> None:
        command = [sys.executable, "-m", "llama_onnx.exporter.cli", "export", str(source), str(out)]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        self.started = time.perf_counter()
        self.data = out.with_name(f"{out.name}.partial") / DATA_FILE

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def size(self) -> int:
        try:
            return self.data.stat().st_size
        except OSError:
            return 0

    def watch(self) -> Times:
        """Wait for the end and return when what happened."""
        first = last = 0.0
        size = 0
        while self.process.poll() is None:
            now = self.size()
            if now and not first:
                first = self.elapsed()
            if now > size:
                size, last = now, self.elapsed()
            time.sleep(POLL)
        if self.process.returncode:
            raise SystemExit(f"the export ended with status {self.process.returncode}")
        return Times(first, last, self.elapsed(), size)

    def kill_at(self, moment: Moment, total: int) -> bool:
        """Kill it when `moment` is due; return False if it ended before."""
        complete: float | None = None
        found = self.size()
        while self.process.poll() is None:
            # Weights that an earlier run wrote do not count.
            size = self.size()
            size, found = (0, found) if size == found else (size, -1)
            if size == total and complete is None:
                complete = self.elapsed()
            after = -1.0 if complete is None else self.elapsed() - complete
            if moment.due(State(self.elapsed(), size, after)):
                self.process.kill()
                break
            time.sleep(POLL)
        return self.process.wait() == -9


def moments(rng: random.Random, count: int, times: Times) -> list[Moment]:
    before = rng.uniform(0, times.first)
    # In the first half only, because the next run may be faster.
    after = rng.uniform(0, (times.end - times.last) / 2)
    places = sorted(rng.uniform(0, 1) for _ in range(count - 2))
    return [
        Moment(
            f"{before:.2f} s after the start",
            lambda state: state.seconds >= before or state.size > 0,
        ),
        *(_at(place, times.data_bytes) for place in places),
        Moment(f"{after:.2f} s after the last weight", lambda state: state.after >= after),
    ]


def _at(place: float, total: int) -> Moment:
    return Moment(f"at {place:.1%} of the weights", lambda state: state.size >= place * total)


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if names != sorted(path.name for path in other.iterdir()):
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where the packages go  [default: beside SOURCE]")
    parser.add_argument("options", nargs="*", help="for llama-onnx export, after --")
    arguments = parser.parse_args()
    source, rng = arguments.source, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.work or source.parent) as temporary:
        unbroken, out = Path(temporary, "unbroken"), Path(temporary, "killed")
        times = Export(source, unbroken, arguments.options).watch()
        print(f"uninterrupted: {times.data_bytes / 1e9:.2f} GB in {times.end:.1f} s", flush=True)
        resume: list[str] = []
        for moment in moments(rng, arguments.kills, times):
            export = Export(source, out, [*arguments.options, *resume])
            if not export.kill_at(moment, times.data_bytes):
                print(f"ended before the kill {moment.what}")
                break
            print(f"killed {moment.what}, after {export.elapsed():.1f} s", flush=True)
            partial = export.data.parent
            resume = ["--resume"] if partial.exists() else []
        if not out.exists():
            seconds = Export(source, out, [*arguments.options, *resume]).watch().end
            print(f"finished by --resume in {seconds:.1f} s", flush=True)
        if not same(unbroken, out):
            raise SystemExit("the packages differ.")
    print("equal to the uninterrupted package, byte for byte.")


if __name__ == "__main__":
    main()
