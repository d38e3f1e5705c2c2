"""Run a fleet: what is left of each task, as much at once as fits, again if it died."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from llama_onnx.exporter.fleet.fleet_task import Fleet, Task
from llama_onnx.exporter.fleet.make_package import Order
from llama_onnx.exporter.fleet.task_inputs import open_task, states
from llama_onnx.exporter.fleet.task_process import Outcome
from llama_onnx.exporter.fleet.task_record import FOLDER_NAME, left_to_do, read_record
from llama_onnx.exporter.packaging.plan import make_plan
from llama_onnx.targets.errors import CheckpointError, LlamaOnnxError, ResourceError
from llama_onnx.targets.lock import locked
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.registry import get_target

RETRIES = 2
"""How often a task whose process died is tried again."""

PROOF_MEMORY = 640 << 20
"""What the process of a proof takes besides twice the package. Tiny models take 0.52 GB in all, and
7B in int4 (3.9 GB) took 5.87 GB, for which this predicts 8.5."""


@dataclass(frozen=True)
class Job:
    """An order, and what it is predicted to take: bytes of memory, bytes of disk."""

    order: Order
    memory: int
    disk: int

    @property
    def name(self) -> str:
        """The task's name."""
        return self.order.task.name


@dataclass
class Row:
    """What became of a task. `state` is "made", "unchanged" or "failed"."""

    task: Task
    state: str = ""
    reason: str = ""
    stages: tuple[str, ...] = ()
    result: dict[str, Any] = field(default_factory=dict)
    memory: int | None = None
    disk: int | None = None
    attempts: int = 0
    died: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return everything, for scripts."""
        result = {n: v for n, v in self.result.items() if not n.startswith("begun ")}
        return {
            "name": self.task.name,
            "source": self.task.source,
            "adapters": list(self.task.adapters),
            "target": self.task.target,
            "options": dict(self.task.options),
            "state": self.state,
            "reason": self.reason,
            "stages": list(self.stages),
            "attempts": self.attempts,
            "died": self.died,
            "seconds": round(self.seconds, 3),
            "predicted_memory_bytes": self.memory,
            "predicted_disk_bytes": self.disk,
            **result,
        }


@dataclass(frozen=True)
class Summary:
    """A run of a fleet."""

    fleet: Fleet
    rows: tuple[Row, ...]
    threads: int
    where: str
    seconds: float

    def count(self, state: str) -> int:
        """Return how many tasks ended so."""
        return sum(row.state == state for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return everything, for scripts."""
        return {
            "format_version": 1,
            "version": version("llama-onnx"),
            "file": str(self.fleet.file),
            "out": str(self.fleet.out),
            "where": self.where,
            "threads": self.threads,
            "seconds": round(self.seconds, 3),
            **{state: self.count(state) for state in ("made", "unchanged", "failed")},
            "tasks": [row.to_json() for row in self.rows],
        }


class Workers(Protocol):
    """Where jobs run."""

    threads: int
    where: str

    def problem(self, job: Job) -> str | None:
        """Return why `job` can never run here, None if it can."""

    def has_room(self, job: Job) -> bool:
        """Whether `job` may start now."""

    def start(self, job: Job) -> None:
        """Start `job`."""

    def wait(self, progress: Progress) -> tuple[Job, Outcome]:
        """Wait until one of the jobs has ended, and return it."""


def run_fleet(
    fleet: Fleet, workers: Workers, *, retries: int = RETRIES, progress: Progress = SILENT
) -> Summary:
    """Do what is left of each task of `fleet`.

    A task that fails costs no other. One whose process dies is tried again, `retries` times; one
    that is refused is not. Raises `UsageError` if another run works in the same folder.
    """
    started = time.monotonic()
    rows = {task.name: Row(task) for task in fleet.tasks}
    jobs = [
        job
        for number, row in enumerate(rows.values())
        if (job := _prepare(fleet, row, workers, progress, number, len(rows))) is not None
    ]
    _drive(jobs, rows, workers, retries, progress)
    seconds = time.monotonic() - started
    return Summary(fleet, tuple(rows.values()), workers.threads, workers.where, seconds)


@contextmanager
def fleet_folder(fleet: Fleet) -> Iterator[Path]:
    """Make the fleet's folder, and lock it for this process."""
    folder = fleet.out / FOLDER_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{folder} cannot be made: {error.strerror or error}.") from None
    busy = f"another fleet is working in {fleet.out}: wait for it, or stop it."
    with locked(folder / "lock", busy):
        yield folder


def _prepare(
    fleet: Fleet, row: Row, workers: Workers, progress: Progress, number: int, count: int
) -> Job | None:
    """Return a task as a job, None if there is nothing to do or it cannot be done."""
    progress.update(f"planning {row.task.name}", number, count)
    try:
        job = plan_job(fleet, row.task, workers.threads)
    except LlamaOnnxError as error:
        row.state, row.reason = "failed", str(error)
        return None
    if job is None:
        record = read_record(fleet.out, row.task)
        row.state, row.result = "unchanged", record.figures() if record else {}
        row.memory = row.result.get("predicted_memory_bytes")
        return None
    row.memory, row.disk = job.memory, job.disk
    if problem := workers.problem(job):
        row.state, row.reason = "failed", problem
        return None
    return job


def plan_job(fleet: Fleet, task: Task, threads: int) -> Job | None:
    """Return `task` with what it is predicted to need, None if nothing is left to do.

    Only headers are read. Raises what `export` raises about source and options.
    """
    base, opened, record = fleet.file.parent, open_task(task), read_record(fleet.out, task)
    unchanged = record is not None and record.states == states(opened.files, base)
    if unchanged and not left_to_do(fleet.out, task, record, base, unchanged=True):
        return None
    plan = make_plan(
        opened.checkpoint,
        get_target(task.target),
        opened.options,
        threads,
        opened.kept,
        frozenset(task.options),
        with_tokenizer=task.tokenizer,
    )
    if task.tokenizer and plan.tokenizer is None:
        raise CheckpointError(
            f"{task.source} has no tokenizer: add it, or set no_tokenizer for a package that takes "
            "token ids only."
        )
    memory = plan.peak_memory
    if task.certify:
        memory = max(memory, PROOF_MEMORY + 2 * plan.data_bytes)
    return Job(Order(task, fleet.out, base, threads, memory), memory, plan.disk_bytes)


def _drive(
    jobs: Sequence[Job], rows: dict[str, Row], workers: Workers, retries: int, progress: Progress
) -> None:
    """Run all jobs, as many at once as the workers have room for."""
    waiting, running, began = list(jobs), 0, dict[str, float]()
    while waiting or running:
        while waiting and (job := _next(waiting, workers)) is not None:
            waiting.remove(job)
            rows[job.name].attempts += 1
            began[job.name] = time.monotonic()
            workers.start(job)
            running += 1
        over = len(jobs) - len(waiting) - running
        job, outcome = workers.wait(_Counted(progress, over, len(jobs)))
        running -= 1
        row = rows[job.name]
        row.seconds += time.monotonic() - began[job.name]
        if outcome.died:
            row.died.append(outcome.reason)
            if row.attempts <= retries:
                waiting.append(job)
                continue
        row.stages, row.reason = outcome.stages, outcome.reason
        row.state = ("made" if outcome.stages else "unchanged") if outcome.result else "failed"
        row.result = outcome.result or {}


def _next(waiting: Sequence[Job], workers: Workers) -> Job | None:
    """Return the first job that there is room for."""
    return next((job for job in waiting if workers.has_room(job)), None)


class _Counted:
    """Progress of a job, as that of all."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total

    def step(self, what: str) -> None:
        """Show `what`, and how many jobs are over."""
        self._progress.update(what[:60], self._done, self._total)

    def update(self, what: str, done: int, total: int, unit: Any = "steps") -> None:
        """Show `what`."""
        self.step(what)


def default_threads(jobs: int) -> int:
    """Return the threads of each of so many jobs on this machine."""
    return max(1, (os.cpu_count() or 1) // jobs)


def report_files(out: Path) -> tuple[Path, Path]:
    """Return the files of the report: for people, for scripts."""
    return out / "fleet.html", out / "fleet.json"
