"""Run the jobs of a fleet as tasks of a Ray cluster, which learns what each needs.

A task starts the same process that a local run does. The list, its sources and the folder of the
packages must be at the same paths on every machine.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_onnx.exporter.fleet.fleet_task import Fleet
from llama_onnx.exporter.fleet.make_package import from_json, to_json
from llama_onnx.exporter.fleet.run import Job
from llama_onnx.exporter.fleet.task_process import Child, Outcome
from llama_onnx.exporter.fleet.task_record import FOLDER_NAME
from llama_onnx.runtime.batch.ray_cluster import (
    THREADS,
    Node,
    ask_nodes,
    connected,
    find_nodes,
    first_sentence,
)
from llama_onnx.targets.errors import describe_reason
from llama_onnx.targets.progress import Progress


class RayWorkers:
    """Tasks of a cluster; Ray starts each when a machine has its CPUs and its memory."""

    def __init__(self, ray: Any, nodes: list[Node], threads: int) -> None:
        """`threads` is for each task."""
        self.threads, self.where = threads, f"a Ray cluster of {len(nodes)} machines"
        self._ray, self._nodes = ray, nodes
        self._running: dict[Any, Job] = {}

    def problem(self, job: Job) -> str | None:
        """Return why no machine can ever have `job`."""
        if any(node.memory >= job.memory for node in self._nodes):
            return None
        most = max(node.memory for node in self._nodes)
        return (
            f"it is predicted to need {job.memory / 1e9:.2f} GB of memory, and no machine of the "
            f"cluster has more than {most / 1e9:.2f} GB for tasks."
        )

    def has_room(self, job: Job) -> bool:
        """Return True: Ray keeps what must wait."""
        return True

    def start(self, job: Job) -> None:
        """Hand `job` to Ray, with what it needs. A task that dies is tried again by the driver."""
        task = self._ray.remote(
            num_cpus=self.threads, memory=job.memory, max_retries=0, max_calls=1
        )(_do)
        self._running[task.options(name=job.name).remote(to_json(job.order))] = job

    def wait(self, progress: Progress) -> tuple[Job, Outcome]:
        """Wait until a task has ended."""
        progress.step(f"{len(self._running)} tasks on the cluster")
        [reference], _ = self._ray.wait(list(self._running), num_returns=1)
        job = self._running.pop(reference)
        try:
            stages, result, reason, died = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:  # its worker, or the machine, is gone
            return job, Outcome(reason=f"{first_sentence(error)}.", died=True)
        return job, Outcome(tuple(stages), result, reason, died)


@contextmanager
def ray_workers(address: str, fleet: Fleet, threads: int | None) -> Iterator[RayWorkers]:
    """Yield the cluster at `address` as workers; the fleet's folder is there already.

    Raises `UsageError` if there is no such cluster, and `PackageError` for a machine that has
    another llama-onnx or does not share the folder.
    """
    each = threads or THREADS
    with connected(address) as ray:
        nodes = find_nodes(ray, each)
        token, mark = fleet.out / FOLDER_NAME / "shared", uuid.uuid4().hex
        token.write_text(mark, encoding="utf-8")
        try:
            ask_nodes(ray, nodes, _look, str(token), mark, version("llama-onnx"))
        finally:
            token.unlink(missing_ok=True)
        yield RayWorkers(ray, nodes, each)


def _look(token: str, mark: str, release: str) -> str | None:
    """Return what a machine lacks, None if it can do tasks."""
    if (here := version("llama-onnx")) != release:
        return f"it has llama-onnx {here}, and the driver {release}: install the same on both."
    folder = Path(token).parent.parent
    try:
        same = Path(token).read_text(encoding="utf-8") == mark
    except OSError as error:
        return f"{folder} is not the driver's ({describe_reason(error)}): share it."
    return None if same else f"{folder} is not the driver's: put it where all machines share it."


def _do(order: str) -> tuple[tuple[str, ...], dict[str, Any] | None, str, bool]:
    """Do an order in a process of its own, which may end in any way."""
    found = Child(from_json(order)).wait()
    return found.stages, found.result, found.reason, found.died
