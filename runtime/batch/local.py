"""Answer lines with several processes on this machine; one that dies costs nothing but time.

Its unfinished lines go to the others. A line that was there twice when a process died is given to
one alone: if that dies too, the line gets an error, so that it cannot stop the others for ever.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from queue import SimpleQueue

from llama_onnx.runtime.batch.batch_format import custom_id_of, not_asked
from llama_onnx.runtime.batch.lines import Line
from llama_onnx.runtime.batch.process import ENDED, FAILED, READY, Process, Told, failure
from llama_onnx.runtime.batch.worker import AHEAD, Opening
from llama_onnx.targets.errors import ResourceError

_SUSPECT = 2
"""Deaths of processes after which a line that was in all of them is tried alone."""

_MOST_DEATHS = 6
"""Most processes that die one after another while no line is finished."""

_MOST_DEATHS_OF_LINES = 4 * _MOST_DEATHS
"""The same where lines that were tried alone seem to be the cause."""


class LocalWorkers:
    """`count` worker processes. `deaths` is how many have died."""

    def __init__(self, opening: Opening, count: int) -> None:
        self._opening, self._count = opening, count
        self._told: SimpleQueue[Told] = SimpleQueue()
        self._processes: list[Process] = []
        self._again: deque[Line] = deque()
        self._suspects: deque[Line] = deque()
        self._blamed: Counter[int] = Counter()
        self._idle_deaths = self.deaths = 0
        self._exhausted = False

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes."""
        return [process.pid for process in self._processes]

    def start(self) -> None:
        """Start the processes and wait until one has opened the package; raise what stopped it."""
        self._processes += [Process(self._opening, self._told) for _ in range(self._count)]
        while not any(process.ready for process in self._processes):
            self._hear(*self._told.get())

    def answer(self, lines: Iterator[Line]) -> Iterator[Line]:
        """Yield the number of each line and its answer, as they come."""
        self._feed(lines)
        while not self._is_over():
            yield from self._hear(*self._told.get())
            self._feed(lines)

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.close()

    def __enter__(self) -> LocalWorkers:
        """Return the workers themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes."""
        self.close()

    def _is_over(self) -> bool:
        left = self._again or self._suspects or any(process.lines for process in self._processes)
        return self._exhausted and not left

    def _hear(self, process: Process, number: int, content: bytes) -> list[Line]:
        if number == ENDED:
            return self._bury(process)
        if number == FAILED:
            raise failure(content)
        if number == READY:
            process.ready = True
            return []
        del process.lines[number]
        process.alone = False
        self._idle_deaths = 0
        return [(number, content)]

    def _bury(self, process: Process) -> list[Line]:
        """Take the lines of a process that has died, and start another in its place."""
        self.deaths += 1
        self._idle_deaths += 1
        how, lost = process.how(), []
        process.close()
        for number, text in process.lines.items():
            self._blamed[number] += 1
            if process.alone:
                reason = f"the process that answered this line alone {how}, for the third time."
                answered = not_asked(custom_id_of(text), "worker_died", reason)
                lost.append((number, answered.to_bytes()))
            elif self._blamed[number] >= _SUSPECT:
                self._suspects.append((number, text))
            else:
                self._again.append((number, text))
        # A line that was the cause has its answer now, but not all lines can be.
        if self._idle_deaths >= (_MOST_DEATHS_OF_LINES if lost else _MOST_DEATHS):
            raise ResourceError(
                f"{self._idle_deaths} worker processes died one after another; the last {how}, "
                "perhaps for lack of memory: use fewer --workers, or less --cache-memory."
            )
        place = self._processes.index(process)
        self._processes[place] = Process(self._opening, self._told)
        return lost

    def _feed(self, lines: Iterator[Line]) -> None:
        """Give each process lines, so that it has as many as it can work on and a few more."""
        for process in self._processes:
            if not process.ready or process.alone:
                continue
            if self._suspects:  # no new lines until one is empty
                if not process.lines:
                    process.alone = True
                    process.give(*self._suspects.popleft())
                continue
            while len(process.lines) < self._opening.rows + AHEAD:
                line = self._again.popleft() if self._again else next(lines, None)
                if line is None:
                    self._exhausted = True
                    break
                process.give(*line)
