"""The engine's thread: it owns the session and the caches, and nobody else touches them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from llama_onnx.runtime import ort
from llama_onnx.runtime.engine.answer import GONE
from llama_onnx.runtime.engine.cache_layout import Block
from llama_onnx.runtime.engine.errand import Errand
from llama_onnx.runtime.engine.events import Reason
from llama_onnx.runtime.engine.head_rows import AS_SEVERAL
from llama_onnx.runtime.engine.prefixes import SHORTEST, Entry, Prefixes, common
from llama_onnx.runtime.engine.schedule import (
    Capacity,
    Job,
    Need,
    Read,
    Step,
    admit,
    next_action,
)
from llama_onnx.runtime.engine.shared_rows import Logits, Rows, SharedRows
from llama_onnx.runtime.engine.speculation.speculator import Speculator, Text
from llama_onnx.runtime.engine.task import Task
from llama_onnx.runtime.memory import trim_heap
from llama_onnx.targets.errors import LlamaOnnxError

log = logging.getLogger("llama_onnx.engine")

_T = TypeVar("_T")

_UNREAD = AS_SEVERAL
"""Tokens of a prompt that are read in any case: the logits after them are needed."""


class Loop:
    """Takes requests, and does one thing after the other for them until it is closed.

    `open_rows` returns the rows for an adapter. `longest` is the most tokens of a prompt to read
    at once, None for all. `speculator` drafts tokens for rows that can verify them.
    """

    def __init__(
        self,
        open_rows: Callable[[str | None], Rows],
        capacity: Capacity,
        position_bytes: int,
        longest: int | None,
        speculator: Speculator | None = None,
    ) -> None:
        self._open_rows: Callable[[str | None], Rows] | None = open_rows
        self._capacity, self._longest = capacity, longest
        self._speculator = speculator
        self._prefixes = Prefixes(position_bytes)
        self._options = ort.run_options()
        self._inbox: SimpleQueue[Task | Errand[Any] | None] = SimpleQueue()
        self._waiting: dict[int, Task] = {}
        self._errands: list[Errand[Any]] = []
        self._held: dict[int, Task] = {}
        self._rows: dict[str | None, Rows] = {}
        self._owed = 0.0
        self._turn = 0
        self.positions = 0, 0  # of buffers, and kept of earlier texts; for other threads to read
        self._closing, self._lock = False, Lock()
        self._thread = Thread(target=self._run, name="llama-onnx engine", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether answers may still get events."""
        return self._thread.is_alive()

    def load(self) -> tuple[int, int, int]:
        """Return how many answers are in work and wait, and the positions in use; a glance from
        another thread, which may be a step late."""
        waiting = len(self._waiting) + self._inbox.qsize()
        return len(self._held), waiting, sum(self.positions)

    def put(self, task: Task | Errand[Any]) -> None:
        """Add a request, from any thread; raise `LlamaOnnxError` if nobody would answer it."""
        with self._lock:
            if self._closing:
                raise LlamaOnnxError(GONE)
            self._inbox.put(task)

    def call(self, function: Callable[[Prefixes, int], _T]) -> _T:
        """Call `function` in the engine's thread, between two steps, and return what it returns.

        Its arguments are what was read before, and the most positions that may have. Answers that
        were cancelled earlier have left what was read for them there. Raises as `put` does.
        """

        def work() -> _T:
            found = function(self._prefixes, self._make_room())
            self._note_positions()
            return found

        errand = Errand(work)
        self.put(errand)
        return errand.wait()

    def close(self) -> None:
        """End all answers and free everything, also in the middle of a step; from any thread."""
        self._closing = True
        self._options.terminate = True
        self._inbox.put(None)
        if current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        failure: BaseException = LlamaOnnxError(GONE)
        try:
            while self._receive():
                self._advance()
                self._note_positions()
        except BaseException as error:  # a mistake in this code must not leave anybody waiting
            log.exception("the engine's thread failed")
            failure = error
        finally:
            with self._lock:  # after this, nobody can add a request
                self._closing = True
            self._empty_inbox()
            for task in [*self._held.values(), *self._waiting.values()]:
                task.fail(failure)
            while self._errands:
                self._errands.pop().fail(LlamaOnnxError(GONE))
            self._held.clear()
            self._waiting.clear()
            self._rows.clear()
            self._prefixes.shrink(0)
            self._note_positions()
            self._open_rows = self._speculator = None
            trim_heap()

    def _note_positions(self) -> None:
        allocated = sum(rows.allocated for rows in self._rows.values())
        self.positions = allocated, self._prefixes.positions

    def _receive(self) -> bool:
        """Take new requests, waiting for one if there is nothing else; False: the end."""
        if not self._held and not self._waiting:
            self._accept(self._inbox.get())
        self._empty_inbox()
        return not self._closing

    def _empty_inbox(self) -> None:
        while not self._inbox.empty():
            self._accept(self._inbox.get())

    def _accept(self, task: Task | Errand[Any] | None) -> None:
        if isinstance(task, Errand):
            self._errands.append(task)
        elif task is not None:
            self._waiting[task.key] = task

    def _advance(self) -> None:
        """Drop who has left, let in who has room, and do one thing for those that are in."""
        for task in [t for t in self._waiting.values() if t.channel.cancelled]:
            del self._waiting[task.key]
            task.end("cancelled")
        for task in [t for t in self._held.values() if t.channel.cancelled]:
            self._finish(task, "cancelled")
        while self._errands:
            self._errands.pop(0).run()
        self._admit()
        if not self._held:
            return
        jobs = {task.key: self._job(task) for task in self._held.values()}
        action = next_action(jobs.values(), self._owed, self._longest)
        if isinstance(action, Step):
            self._step([self._held[key] for key in action.keys])
        elif not self._adopt(self._held[action.key]):
            alone = all(job.unread for job in jobs.values())
            self._read(self._held[action.key], action, alone)

    def _job(self, task: Task) -> Job:
        unread = 0 if task.new_tokens else task.prompt_tokens - self._filled(task)
        return Job(task.key, task.request.adapter, unread, task.served)

    def _filled(self, task: Task) -> int:
        return self._rows[task.request.adapter].filled(task.key)

    def _admit(self) -> None:
        needs = {task.key: task.need for task in self._waiting.values()}
        held = [task.need for task in self._held.values()]
        for key in admit(needs, held, self._capacity):
            task = self._waiting.pop(key)
            self._held[key] = task
            task.admit()
            self._serve(task)
            self._make_room()
            group = task.request.adapter
            try:
                if group not in self._rows:
                    assert self._open_rows is not None
                    self._rows[group] = self._open_rows(group)
                self._rows[group].open(key, task.need.positions)
            except Exception as error:
                self._fail([task], error)

    def _make_room(self) -> int:
        """Drop what others read before, where the room is needed; return what is left for it."""
        groups: dict[str | None, list[Need]] = {group: [] for group in self._rows}
        for task in self._held.values():
            groups.setdefault(task.need.group, []).append(task.need)
        reserved = {g: self._capacity.positions_of(needs) for g, needs in groups.items()}
        if self._taken(reserved) > self._capacity.positions:
            self._compact(reserved)
        left = self._capacity.positions - self._taken(reserved)
        self._prefixes.shrink(left)
        return left

    def _compact(self, reserved: Mapping[str | None, int]) -> None:
        """Give back what sequences that are over have left."""
        for group, rows in list(self._rows.items()):
            if rows.allocated > reserved[group]:
                try:
                    rows.compact()
                except Exception as error:
                    held = [task for task in self._held.values() if task.need.group == group]
                    self._fail(held, error)

    def _taken(self, reserved: Mapping[str | None, int]) -> int:
        """Return the positions that buffers have or will have, for each adapter's `reserved`."""
        return sum(
            max(most, self._rows[group].allocated if group in self._rows else 0)
            for group, most in reserved.items()
        )

    def _serve(self, task: Task) -> None:
        self._turn += 1
        task.served = self._turn

    def _read(self, task: Task, action: Read, alone: bool) -> None:
        """Read a part of a prompt, and choose the first token after the last part."""
        self._serve(task)
        rows, started = self._rows[task.request.adapter], perf_counter()
        first = rows.filled(task.key)
        end = first + action.count
        more = end < task.prompt_tokens
        try:
            logits = rows.read(task.key, task.prompt[first:end], self._options, more=more)
        except Exception as error:
            self._fail([task], error)
            return
        seconds = perf_counter() - started
        task.read_seconds += seconds
        self._owed = 0.0 if alone else self._owed + seconds
        if not more:
            self._choose({task.key: task}, {task.key: logits})

    def _step(self, tasks: list[Task]) -> None:
        started = perf_counter()
        for task in tasks:
            self._serve(task)
        # Several sequences share a step already: that gains more than drafts for each of them.
        alone = self._text(tasks[0]) if len(tasks) == 1 else None
        if alone is not None and self._speculator is not None:
            if drafts := self._speculator.propose(alone, self._options):
                self._verify(tasks[0], alone, drafts, started)
                return
            stepping = perf_counter()
        rows = self._rows[tasks[0].request.adapter]
        try:
            logits = rows.step({t.key: int(t.tokens[-1]) for t in tasks}, self._options)
        except Exception as error:
            self._fail(tasks, error)
            return
        ended = perf_counter()
        if alone is not None and self._speculator is not None:
            self._speculator.stepped(alone, ended - stepping)
        self._owed = max(0.0, self._owed - (ended - started))
        self._choose({task.key: task for task in tasks}, logits)

    def _text(self, task: Task) -> Text | None:
        """Return what the speculator needs to know of a sequence; None: it must not draft."""
        if self._speculator is None or not task.request.speculate:
            return None
        # The step itself gives a token without any draft.
        room = task.request.max_new_tokens - task.new_tokens - 1
        return Text(task.key, task.request.adapter, task.tokens, room, task.need.positions)

    def _verify(self, task: Task, text: Text, drafts: list[int], started: float) -> None:
        """Make a step of several positions, and keep those whose tokens were chosen."""
        rows, verifying = self._rows[text.group], perf_counter()
        assert isinstance(rows, SharedRows) and self._speculator is not None
        before, filled = task.new_tokens, rows.filled(task.key)
        ids = np.array([task.tokens[-1], *drafts], np.int64)
        try:
            logits = rows.verify(task.key, ids, self._options)
            ended = perf_counter()
            reason = task.verify(drafts, logits)
        except Exception as error:
            self._fail([task], error)
            return
        got = task.new_tokens - before
        rows.rewind(task.key, filled + got)
        self._speculator.verified(text, drafts, got, ended - verifying)
        self._owed = max(0.0, self._owed - (ended - started))
        if reason is not None:
            self._finish(task, reason)

    def _choose(self, tasks: Mapping[int, Task], logits: Mapping[int, Logits]) -> None:
        for key, task in tasks.items():
            try:
                reason = task.accept(logits[key])
            except Exception as error:
                self._fail([task], error)
                continue
            if reason is not None:
                self._finish(task, reason)

    def _finish(self, task: Task, reason: Reason) -> None:
        """End an answer, and keep what was read for it."""
        task.end(reason)
        try:
            self._keep(task)
        except Exception as error:  # a device says in a way of its own that its memory is full
            log.warning("what was read is not kept for later prompts: %s", error)
            self._prefixes.shrink(0)
        self._drop(task)

    def _keep(self, task: Task) -> None:
        group, filled = task.request.adapter, self._filled(task)
        tokens = task.tokens[:filled]
        if not task.request.reuse or filled < SHORTEST or self._prefixes.has(group, tokens):
            return
        room = self._make_room()
        block = self._rows[group].copy(task.key, 0, filled) if filled <= room else None
        if block is not None:
            self._prefixes.put(Entry(group, tokens.copy(), block), room)

    def _adopt(self, task: Task) -> bool:
        """Give a prompt what has been read of it already, by whomever; False: nothing more."""
        if not task.request.reuse:
            return False
        group, rows = task.request.adapter, self._rows[task.request.adapter]
        filled, prompt = rows.filled(task.key), task.prompt[:-_UNREAD]
        length, entry = self._prefixes.find(group, prompt)
        other: Task | None = None
        for held in self._held.values():
            if held is not task and held.request.adapter == group:
                shared = common(held.tokens[: rows.filled(held.key)], prompt)
                if shared > length:
                    length, other = shared, held
        if length - filled < SHORTEST:
            return False
        block: Block | None
        try:
            if other is not None:
                block = rows.copy(other.key, filled, length)
            else:
                assert entry is not None
                block = {name: part[:, filled:length] for name, part in entry.block.items()}
            if block is None:
                return False
            rows.append(task.key, block)
        except Exception as error:
            self._fail([task], error)
            return True
        task.reused += length - filled
        return True

    def _fail(self, tasks: list[Task], error: Exception) -> None:
        """End the answers that an error concerns: where caches are in doubt, all of a group."""
        if not tasks:
            return
        group = tasks[0].request.adapter
        if group in self._rows and self._rows[group].broken:
            tasks = [task for task in self._held.values() if task.request.adapter == group]
            del self._rows[group]
        for task in tasks:
            task.fail(LlamaOnnxError(GONE) if self._closing else error)
            self._drop(task)

    def _drop(self, task: Task) -> None:
        """Free the place of an answer that is over."""
        group = task.request.adapter
        if self._held.pop(task.key, None) is None:  # failed in the meantime
            return
        if self._speculator is not None:
            self._speculator.forget(task.key)
        if any(held.request.adapter == group for held in self._held.values()):
            if group in self._rows:
                self._rows[group].close(task.key)
        else:
            self._rows.pop(group, None)  # and its buffers with it
            trim_heap()
