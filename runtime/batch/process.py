"""A worker in a process of its own: lines go in, answers come back, in any order.

Both directions are frames: a number, a length, and as many bytes. A process whose driver is gone
ends at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from queue import SimpleQueue
from typing import BinaryIO

from llama_onnx.runtime.batch.worker import Opening, Worker
from llama_onnx.runtime.doctor.child import DEAF, command_of, how_ended, take_stdout
from llama_onnx.targets import errors
from llama_onnx.targets.errors import LlamaOnnxError, describe_reason
from llama_onnx.targets.providers import get_provider

READY, FAILED, ENDED = -1, -2, -3
"""Numbers of frames that are not about a line: the package is open, or why it could not be opened;
and, in the driver alone, that the process has ended."""

_HEAD = struct.Struct(">qQ")

Told = tuple["Process", int, bytes]


class Process:
    """A worker process, as its driver sees it.

    `lines` has the lines it was given and has not answered. `alone`: it has one that must have no
    neighbors.
    """

    def __init__(self, opening: Opening, told: SimpleQueue[Told]) -> None:
        """Start it; what it says comes to `told`, and at its end the number `ENDED`."""
        self.lines: dict[int, bytes] = {}
        self.ready = self.alone = False
        fields = asdict(opening) | {"provider": opening.provider and opening.provider.name}
        command = command_of(__name__, json.dumps(fields), first=DEAF)
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._into, out = self._popen.stdin, self._popen.stdout
        threading.Thread(target=self._listen, args=(out, told), daemon=True).start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._popen.pid

    def give(self, number: int, text: bytes) -> None:
        """Give it a line."""
        self.lines[number] = text
        try:
            self._into.write(_HEAD.pack(number, len(text)) + text)
            self._into.flush()
        except OSError:
            pass  # it has ended, which comes to `told`

    def how(self) -> str:
        """Return how it ended, in words."""
        return how_ended(self._popen.wait())

    def close(self) -> None:
        """End it."""
        self._popen.kill()
        self._popen.wait()
        for pipe in (self._popen.stdin, self._popen.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass  # what was to be written goes nowhere

    def _listen(self, out: BinaryIO, told: SimpleQueue[Told]) -> None:
        try:
            while (frame := _read(out)) is not None:
                told.put((self, *frame))
        except (OSError, ValueError):  # closed in the middle
            pass
        told.put((self, ENDED, b""))


def words_of(error: Exception) -> list[str]:
    """Return why a package cannot be opened, for `failure`."""
    if isinstance(error, LlamaOnnxError):
        return [type(error).__name__, str(error)]
    reason = f"{type(error).__name__}: {describe_reason(error)}"
    return ["LlamaOnnxError", f"opening the package failed: {reason}."]


def failure(content: bytes) -> LlamaOnnxError:
    """Return the error in a frame `FAILED`."""
    name, text = json.loads(content)
    kind = getattr(errors, name, LlamaOnnxError)
    found: LlamaOnnxError = kind(text)
    return found


def _read(file: BinaryIO) -> tuple[int, bytes] | None:
    """Return the next frame, None at the end, also in the middle of one."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    number, length = _HEAD.unpack(head)
    content = file.read(length)
    return (number, content) if len(content) == length else None


def main() -> None:
    """Be a worker process: open the package, and answer lines until stdin ends."""
    out = os.fdopen(take_stdout(), "wb")
    lock = threading.Lock()

    def tell(number: int, content: bytes) -> None:
        with lock:
            out.write(_HEAD.pack(number, len(content)) + content)
            out.flush()

    fields = json.loads(sys.argv[1])
    if fields["provider"] is not None:
        fields["provider"] = get_provider(fields["provider"])
    try:
        worker = Worker(Opening(**fields))
    except Exception as error:  # nobody may wait for a process that cannot open the package
        tell(FAILED, json.dumps(words_of(error)).encode())
        return
    tell(READY, b"")
    asyncio.run(_serve(worker, tell))


async def _serve(worker: Worker, tell: Callable[[int, bytes], None]) -> None:
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    async def answer(number: int, text: bytes) -> None:
        try:
            answered = await worker.answer(text)
            tell(number, answered.to_bytes())
        except BaseException:  # nobody can answer here, or nobody listens
            os._exit(1)

    def begin(number: int, text: bytes) -> None:
        task = loop.create_task(answer(number, text))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def listen() -> None:
        while (frame := _read(sys.stdin.buffer)) is not None:
            loop.call_soon_threadsafe(begin, *frame)
        os._exit(0)  # in the middle of a step, if need be: nobody waits for an answer

    threading.Thread(target=listen, daemon=True).start()
    await asyncio.Event().wait()
