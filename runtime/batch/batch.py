"""Answer all lines of a file, and write the answers in the order of the lines.

Finished lines go to a journal beside the output as they come. A run that ends early leaves it, and
the next one with the same arguments answers only the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from llama_onnx.runtime.batch.batch_format import AnsweredLine
from llama_onnx.runtime.batch.line_journal import Journal, began_with_force, full, open_journal
from llama_onnx.runtime.batch.lines import Line, Source, open_source
from llama_onnx.runtime.batch.local import LocalWorkers
from llama_onnx.runtime.batch.worker import Opening
from llama_onnx.runtime.doctor.gather import gather_memory, gather_processor
from llama_onnx.runtime.engine.cache_budget import shared_bytes
from llama_onnx.runtime.tuning.tuned import choose
from llama_onnx.targets.durable import replacing
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.registry import get_target

JOURNAL_SUFFIX = ".journal"

_WEIGHTS_SHARE = 0.5
"""Of the free memory, for the weights of all workers: each process has its own."""


@dataclass(frozen=True)
class Summary:
    """What a run did: `lines` of the file, of which `reused` were finished before, and `errors`.

    The first error is in line `first_error`, counted from 1.

    Tokens and their rate are those of this run, after `start_seconds`, in which the packages were
    opened. `deaths` of worker processes; `repeated_ids` counts lines whose custom_id an earlier
    line has.
    """

    lines: int
    reused: int
    errors: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float | None
    start_seconds: float
    seconds: float
    workers: int
    threads: int | None
    deaths: int
    repeated_ids: int
    first_error: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything."""
        return asdict(self)


@dataclass
class Started:
    """Workers that have opened the package: how many, with how many threads each, and what answers
    the lines that are not done.

    At the end, `deaths` is how many died, and `late` how many seconds the last of them opened the
    package after it was said that they had.
    """

    workers: int
    threads: int
    answer: Callable[[bytearray], Iterator[Line]]
    deaths: Callable[[], int] = lambda: 0
    late: Callable[[], float] = lambda: 0.0


Start = Callable[[Opening, Source, int], AbstractContextManager[Started]]
"""Opens the package in workers: its arguments are the opening, the file, and how many of its lines
are not finished."""


def open_package(path: Path) -> tuple[ModelPackage, str]:
    """Return the package at `path`, which takes text, and what identifies it."""
    package = ModelPackage.open(path)
    package.require_tokenizer()
    return package, hash_file(package.index)


def describe_tuning(package: ModelPackage, provider: Provider | None) -> str | None:
    """Return which settings of `tune` the workers on this machine use, None if there are none."""
    asked = provider or get_target(package.target).session.provider
    return choose(package, asked, threads=1)[1]  # workers divide the threads among themselves


def run_batch(
    opening: Opening,
    source: Path,
    out: Path,
    start: Start,
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> Summary:
    """Answer the lines of `source` with the workers of `start`, and write the answers to `out`.

    Raises `UsageError` for files that cannot be read or written, or if a journal of other work is
    there and not `force`; `ResourceError` if the disk is full or workers keep dying.
    """
    check_output(source, out, force=force)
    progress.step(f"reading {source.name}")
    lines = open_source(source)
    identity = {
        "work": "batch",
        "input": lines.sha256,
        "package": opening.sha256,
        "name": opening.name,
        "max_length": opening.max_length,
        "version": version("llama-onnx"),
    }
    with open_journal(journal_of(out), identity, lines.count, force=force) as journal:
        summary = _answer(opening, lines, start, journal, progress)
        progress.step(f"writing {out.name}")
        errors, first, repeated = _write(journal, out)
        journal.over = True
    return replace(summary, errors=errors, first_error=first, repeated_ids=repeated)


def journal_of(out: Path) -> Path:
    """Return where the finished lines are kept until all are."""
    return out.with_name(out.name + JOURNAL_SUFFIX)


def check_output(source: Path, out: Path, *, force: bool) -> None:
    """Raise `UsageError` if the answers cannot go to `out`.

    They may replace a file with `force`, or if a run that began so is continued.
    """
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"{out} must be a file in a folder that exists.")
    for written in (out, journal_of(out)):
        if source.exists() and written.exists() and written.samefile(source):
            raise UsageError(f"{written} is the input: give the answers a file of their own.")
    if out.exists() and not force and not began_with_force(journal_of(out)):
        raise UsageError(f"{out} exists: give another name, or replace it with --force.")


def _answer(
    opening: Opening, lines: Source, start: Start, journal: Journal, progress: Progress
) -> Summary:
    reused, began = journal.finished, perf_counter()
    prompt = new = deaths = 0
    left = lines.count - reused
    workers, threads, ready = 0, None, began
    if left:
        progress.step("opening the package")
        with start(opening, lines, left) as started:
            workers, threads, ready = started.workers, started.threads, perf_counter()
            progress.update("answering", reused, lines.count)
            for number, content in started.answer(journal.done):
                if journal.add(number, content):
                    answered = AnsweredLine.from_bytes(content)
                    prompt += answered.prompt_tokens
                    new += answered.new_tokens
                    progress.update("answering", journal.finished, lines.count)
            deaths = started.deaths()
            ready += started.late()
    seconds = perf_counter() - ready
    return Summary(
        lines=lines.count,
        reused=reused,
        errors=0,
        prompt_tokens=prompt,
        new_tokens=new,
        tokens_per_second=new / seconds if left and seconds else None,
        start_seconds=ready - began,
        seconds=seconds,
        workers=workers,
        threads=threads,
        deaths=deaths,
        repeated_ids=0,
    )


def _write(journal: Journal, out: Path) -> tuple[int, int | None, int]:
    """Write the finished lines in order; return how many are errors, the number of the first of
    these, from 1, and how many repeat an id."""
    if journal.finished < len(journal.done):
        missing = len(journal.done) - journal.finished
        raise UsageError(f"{missing:,} lines have no answer: run the same command again.")
    errors, first, lines, ids = 0, None, 0, set[bytes]()
    try:
        with replacing(out) as file:
            for number, content in enumerate(journal.contents(), 1):
                answered = AnsweredLine.from_bytes(content)
                file.write(answered.output + b"\n")
                if answered.failed:
                    errors, first = errors + 1, first or number
                custom_id = json.loads(answered.output)["custom_id"]
                if custom_id is not None:
                    lines += 1
                    ids.add(hashlib.blake2b(custom_id.encode(), digest_size=8).digest())
    except OSError as error:
        raise full(out, error, journal.finished) from None
    return errors, first, lines - len(ids)


@dataclass(frozen=True)
class Plan:
    """How many workers, with how many threads each."""

    workers: int
    threads: int


def plan_workers(workers: int | None, threads: int | None, package: ModelPackage) -> Plan:
    """Return how many workers this machine gets for `package`, and the threads of each.

    By default one with a single thread for each processor: on two, that is 1.2 times as fast as one
    worker with two threads. Fewer where half of the free memory does not hold as many packages.
    """
    processors = _processors()
    if workers is None:
        workers = max(1, processors // (threads or 1))
        if (memory := gather_memory()) is not None:
            size = package.data_path.stat().st_size
            workers = max(1, min(workers, int(memory.available * _WEIGHTS_SHARE // size)))
    return Plan(workers, threads or max(1, processors // workers))


def _processors() -> int:
    """Return how many processors this process may keep busy, at least 1."""
    return max(1, int(gather_processor().usable))


def local_start(plan: Plan, cache_bytes: int | None, package: ModelPackage) -> Start:
    """Return what opens `package` in processes on this machine, which share the memory.

    `cache_bytes` is for the caches of all of them; None: half of what they leave free.
    """

    @contextmanager
    def start(opening: Opening, source: Source, left: int) -> Iterator[Started]:
        count = min(plan.workers, left)
        whole = cache_bytes
        if whole is None:
            whole = shared_bytes(count, package.data_path.stat().st_size)
        with LocalWorkers(opening.share(count, whole, plan.threads), count) as workers:
            workers.start()
            yield Started(
                count,
                plan.threads,
                lambda done: workers.answer(source.read(done)),
                lambda: workers.deaths,
            )

    return start


def _counted(count: int, one: str, several: str | None = None) -> str:
    return f"1 {one}" if count == 1 else f"{count:,} {several or one + 's'}"


def describe(summary: Summary, out: Path) -> Iterator[str]:
    """Yield what to tell about a run."""
    known = f", {summary.reused:,} of them finished before" if summary.reused else ""
    wrong = "no errors"
    if summary.errors:
        first = "in" if summary.errors == 1 else "the first in"
        wrong = f"{_counted(summary.errors, 'error')}, {first} line {summary.first_error:,}"
    yield f"{out}: {_counted(summary.lines, 'line')}{known}; {wrong}."
    if summary.tokens_per_second is not None:
        workers = _counted(summary.workers, "worker")
        yield (
            f"{summary.new_tokens:,} tokens in {summary.seconds:.1f} s, "
            f"{summary.tokens_per_second:.1f} tok/s, by {workers} that opened in "
            f"{summary.start_seconds:.1f} s."
        )
    if summary.deaths:
        died = _counted(summary.deaths, "worker process", "worker processes")
        yield f"{died} died; the lines went to others."
    if summary.repeated_ids:
        yield f"{summary.repeated_ids:,} lines have a custom_id that an earlier line has."
