"""Change valid inputs at random and read them: `python -m tests.support.fuzz.run [--minutes N]`.

Every reader works in a child process, so that a crash or a reader that hangs ends only that child.
An input fails if it raises anything but a `LlamaOnnxError`, takes more than 10 seconds, or takes
the process above 1 GB. It is then in FOUND, to be kept as a seed: see tests/fuzz/seeds/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.peak import peak_memory

FOUND = Path("fuzz-found")
SEEDS = Path(__file__).parents[2] / "fuzz" / "seeds"
SECONDS, BYTES = 10.0, 1 << 30
_BATCH = 20  # inputs per reader and turn
_LIFE = 2000  # inputs per child: its memory is then measured anew


@dataclass
class Tally:
    """What happened to the inputs of one reader."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0
    failed: list[str] = field(default_factory=list)


def replay(name: str, files: dict[str, bytes], folder: Path) -> str:
    """Read a valid input of the reader `name` in the empty `folder`, with `files` in place of its
    own; returns "accepted" or "refused"."""
    from llama_onnx.targets.errors import LlamaOnnxError
    from tests.support.fuzz.readers import READERS

    READERS[name].make(folder)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    try:
        READERS[name].read(folder)
    except LlamaOnnxError as error:
        check_sentence(str(error))
        return "refused"
    return "accepted"


def check_sentence(message: str) -> None:
    """Raise `AssertionError` unless the message is a short line that can be printed."""
    message.encode("utf-8")
    assert "\n" not in message, f"more than a line: {message[:200]!r}"
    assert len(message) < 3000, f"{len(message)} characters: {message[:200]!r}"


def seeds() -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield reader, name and changed files of every kept input."""
    for folder in sorted(SEEDS.glob("*/*/")):
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        content = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
        yield folder.parent.name, folder.name, content


def main() -> int:
    """Run for the given time; returns 1 if any input failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--reader", action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    from tests.support.fuzz.readers import READERS

    names = arguments.reader or list(READERS)
    print(f"seed {arguments.seed}, {arguments.minutes:g} minutes, {len(names)} readers", flush=True)
    tallies = {name: Tally() for name in names}
    workers: dict[str, Worker] = {}
    end = time.monotonic() + 60 * arguments.minutes
    shown, turn = time.monotonic(), 0
    while time.monotonic() < end:
        name = names[turn % len(names)]
        turn += 1
        worker = workers.get(name)
        if worker is None or worker.done >= _LIFE:
            if worker is not None:
                worker.stop()
            worker = workers[name] = Worker(name, arguments.seed + turn)
        if not worker.run(_BATCH, tallies[name]):
            workers.pop(name).stop()
        if time.monotonic() > shown + 30:
            shown = time.monotonic()
            _print_progress(tallies, end - shown)
    for worker in workers.values():
        worker.stop()
    return _print_summary(tallies)


class Worker:
    """A child process that reads inputs, and the folder that has the one it reads."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.done = name, 0
        self.folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_child, args=(name, seed, self.folder, theirs), daemon=True
        )
        self._process.start()
        if self._answer(120) is None:
            sys.exit(f"{name}: the valid input is not accepted.")

    def run(self, count: int, tally: Tally) -> bool:
        """Let the child read `count` inputs; returns False if it has to be replaced."""
        for _ in range(count):
            self._pipe.send("next")
            answer = self._answer(SECONDS)
            self.done += 1
            problem = self._judge(answer, tally)
            if problem:
                kept = self._keep(len(tally.failed))
                tally.failed.append(f"{kept}: {problem}")
                print(f"{self.name} FAILED, {kept}: {problem}", flush=True)
                if answer is None or answer["bytes"] > BYTES:
                    return False
        return True

    def _judge(self, answer: dict[str, Any] | None, tally: Tally) -> str | None:
        """Return what is wrong, if anything."""
        if answer is None:
            code = self._process.exitcode
            tally.counts["failed"] += 1
            return f"took over {SECONDS:g} s" if code is None else f"ended the process ({code})"
        seconds, size = float(str(answer["seconds"])), int(str(answer["bytes"]))
        tally.slowest, tally.largest = max(tally.slowest, seconds), max(tally.largest, size)
        problem = answer["problem"]
        if not problem and size > BYTES:
            problem = f"took the process to {size:,} bytes"
        tally.counts["failed" if problem else str(answer["outcome"])] += 1
        return str(problem) if problem else None

    def _answer(self, seconds: float) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] | None = (
                json.loads(self._pipe.recv()) if self._pipe.poll(seconds) else None
            )
        except EOFError:
            self._process.join(5)
            return None
        return answer

    def _keep(self, number: int) -> Path:
        """Copy the changed files of the last input to `FOUND`."""
        kept = FOUND / self.name / f"{int(time.time())}-{number}"
        for file in (self.folder / "changed").rglob("*"):
            if file.is_file():
                target = kept / file.relative_to(self.folder / "changed")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        return kept

    def stop(self) -> None:
        """End the child and remove its files."""
        self._process.kill()
        self._process.join()
        self._pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _child(name: str, seed: int, folder: Path, pipe: Connection) -> None:
    from tests.support.fuzz.mutate import mutated
    from tests.support.fuzz.readers import READERS

    reader, rng = READERS[name], random.Random(seed)
    valid, changed = folder / "valid", folder / "changed"
    valid.mkdir()
    reader.make(valid)
    reader.read(valid)  # a valid input is accepted, and the libraries are loaded
    original = {file: (valid / file).read_bytes() for file in reader.files}
    pipe.send(json.dumps({"ready": True}))
    while pipe.recv() == "next":
        shutil.rmtree(changed, ignore_errors=True)
        file = rng.choice(list(reader.files))
        content = mutated(original[file], reader.files[file], rng)
        (changed / file).parent.mkdir(parents=True, exist_ok=True)
        (changed / file).write_bytes(content)
        (valid / file).write_bytes(content)
        started = time.monotonic()
        outcome, problem = _read(name, valid)
        seconds = time.monotonic() - started
        answer = {
            "outcome": outcome,
            "problem": problem,
            "seconds": seconds,
            "bytes": peak_memory(),
        }
        pipe.send(json.dumps(answer))
        (valid / file).write_bytes(original[file])


def _read(name: str, folder: Path) -> tuple[str, str | None]:
    """Return what became of the input, and what is wrong with that."""
    from llama_onnx.targets.errors import LlamaOnnxError
    from tests.support.fuzz.readers import READERS

    try:
        READERS[name].read(folder)
        return "accepted", None
    except LlamaOnnxError as error:
        try:
            check_sentence(str(error))
        except (AssertionError, UnicodeEncodeError) as wrong:
            return "refused", str(wrong)
        return "refused", None
    except BaseException as error:  # a panic in Rust is not an Exception
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = "".join(traceback.format_exception_only(error)).strip()
        return "failed", f"{text[:300]} ({Path(where.filename).name}:{where.lineno})"


def _print_progress(tallies: dict[str, Tally], left: float) -> None:
    done = sum(tally.counts.total() for tally in tallies.values())
    failed = sum(tally.counts["failed"] for tally in tallies.values())
    print(f"{done:,} inputs, {failed} failed, {max(left, 0) / 60:.1f} minutes left", flush=True)


def _print_summary(tallies: dict[str, Tally]) -> int:
    print(f"\n{'reader':14}{'inputs':>9}{'refused':>9}{'accepted':>9}{'failed':>8}", end="")
    print(f"{'slowest':>10}{'peak':>9}")
    for name, tally in tallies.items():
        counts = tally.counts
        print(f"{name:14}{counts.total():9,}{counts['refused']:9,}{counts['accepted']:9,}", end="")
        print(f"{counts['failed']:8,}{tally.slowest:8.2f} s{tally.largest / 1e6:6.0f} MB")
    failed = [line for tally in tallies.values() for line in tally.failed]
    print("\n".join(failed) or "no input failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
