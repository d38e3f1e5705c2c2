"""Run the jobs of a fleet in processes of this machine."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue

from llama_onnx.exporter.fleet.run import Job
from llama_onnx.exporter.fleet.task_process import Child, Outcome
from llama_onnx.runtime.doctor.gather import gather_memory
from llama_onnx.targets.errors import describe_reason
from llama_onnx.targets.progress import Progress


class LocalWorkers:
    """At most `jobs` processes at once, and no more than the free memory is predicted to hold; one
    may always run."""

    def __init__(self, jobs: int, threads: int) -> None:
        """`threads` is for each."""
        self.threads, self.where = threads, "this machine"
        self._jobs = jobs
        memory = gather_memory()
        self._memory = memory.available if memory else None
        self._children: dict[str, tuple[Job, Child]] = {}
        self._told: SimpleQueue[tuple[Job, Outcome | str]] = SimpleQueue()

    def problem(self, job: Job) -> str | None:
        """Return None: what does not fit alone may still be luckier than the prediction."""
        return None

    def has_room(self, job: Job) -> bool:
        """Whether a process is free, and the memory that is predicted for all of them is there."""
        if not self._children:
            return True
        used = sum(job.memory for job, _ in self._children.values())
        fits = self._memory is None or used + job.memory <= self._memory
        return len(self._children) < self._jobs and fits

    def start(self, job: Job) -> None:
        """Start the process of `job`."""
        child = Child(job.order)
        self._children[job.name] = job, child

        def listen() -> None:
            try:
                outcome = child.wait(lambda what: self._told.put((job, what)))
            except Exception as error:  # whoever waits for it must hear of its end
                child.kill()
                reason = f"what its process says cannot be read: {describe_reason(error)}."
                outcome = Outcome(reason=reason, died=True)
            self._told.put((job, outcome))

        threading.Thread(target=listen, daemon=True).start()

    def wait(self, progress: Progress) -> tuple[Job, Outcome]:
        """Wait until a process has ended. One that another exception interrupts kills them all."""
        try:
            while True:
                try:
                    # With a limit, so that Windows delivers Ctrl-C.
                    job, told = self._told.get(timeout=1)
                except Empty:
                    continue
                if isinstance(told, Outcome):
                    del self._children[job.name]
                    return job, told
                progress.step(f"{job.name}: {told}")
        except BaseException:
            for _, child in self._children.values():
                child.kill()
            raise
