"""An answer as its caller sees it, while the engine's thread generates it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from llama_onnx.runtime.engine.events import EndEvent, Event
from llama_onnx.targets.errors import LlamaOnnxError

_PATIENCE = 1.0
"""Seconds between two looks at whether the engine still runs, and on Windows at Ctrl-C."""

GONE = "the engine was closed before the answer ended: open the package again."


class Channel:
    """The way from the engine's thread to the caller of one answer, and of `cancelled` back.

    Nothing here refers to the answer, so it is freed with the caller's last reference. The engine
    looks at `cancelled` before each step: it has nothing to do only if nobody waits.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self._events: SimpleQueue[Event | LlamaOnnxError] = SimpleQueue()
        self._deliver: Callable[[Event | LlamaOnnxError], Any] = self._events.put

    def put(self, event: Event | LlamaOnnxError) -> None:
        """Hand over an event, from the engine's thread."""
        self._deliver(event)

    def cancel(self) -> None:
        """End the answer, from any thread, also from a finalizer."""
        self.cancelled = True

    def get(self, alive: Callable[[], bool]) -> Event | LlamaOnnxError:
        """Wait for the next event; return an error once the engine is not `alive`."""
        while True:
            try:
                return self._events.get(timeout=_PATIENCE)
            except Empty:
                if not alive():
                    break
        with suppress(Empty):  # it may have put its last event just before it ended
            return self._events.get_nowait()
        return LlamaOnnxError(GONE)

    def deliver_to(self, loop: asyncio.AbstractEventLoop) -> asyncio.Queue[Event | LlamaOnnxError]:
        """Return a queue of `loop` that gets the events from now on; call it before the first."""
        queue: asyncio.Queue[Event | LlamaOnnxError] = asyncio.Queue()

        def deliver(event: Event | LlamaOnnxError) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, event)
            except RuntimeError:  # the loop is closed, and nobody waits
                self.cancelled = True

        self._deliver = deliver
        return queue


class Answer(Iterator[Event]):
    """The events of an answer, which the engine generates whether or not they are read.

    `cancel()` ends it, from any thread, at the engine's next step or part of a prompt; so do
    leaving a `with` block and dropping the last reference. What was generated until then can still
    be read.
    """

    def __init__(self, channel: Channel, engine: Any, alive: Callable[[], bool]) -> None:
        self._channel, self._alive = channel, alive
        self._engine: Any = engine  # stays open as long as its answers
        self._over = False
        self.end: EndEvent | None = None
        weakref.finalize(self, channel.cancel).atexit = False

    def __iter__(self) -> Answer:
        """Return the answer itself."""
        return self

    def __next__(self) -> Event:
        """Return the next event, the last of which is an `EndEvent`.

        Raises `LlamaOnnxError` if the answer fails; after that, and after the end, it is empty.
        """
        if self._over:
            raise StopIteration
        event = self._channel.get(self._alive)
        if isinstance(event, LlamaOnnxError):
            self._finish()
            raise event
        if isinstance(event, EndEvent):
            self.end = event
            self._finish()
        return event

    def cancel(self) -> None:
        """End the answer, from any thread; does nothing if it has ended."""
        self._channel.cancel()

    def __enter__(self) -> Answer:
        """Return the answer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the answer."""
        self.cancel()

    def _finish(self) -> None:
        self._over, self._engine = True, None


class AsyncAnswer(AsyncIterator[Event]):
    """The same events for `async for`, in the loop that asked for them."""

    def __init__(
        self, channel: Channel, engine: Any, queue: asyncio.Queue[Event | LlamaOnnxError]
    ) -> None:
        self._channel, self._queue = channel, queue
        self._engine: Any = engine
        self._over = False
        self.end: EndEvent | None = None
        weakref.finalize(self, channel.cancel).atexit = False

    def __aiter__(self) -> AsyncAnswer:
        """Return the answer itself."""
        return self

    async def __anext__(self) -> Event:
        """Return the next event; see `Answer`."""
        if self._over:
            raise StopAsyncIteration
        event = await self._queue.get()
        if isinstance(event, LlamaOnnxError):
            self._over, self._engine = True, None
            raise event
        if isinstance(event, EndEvent):
            self.end, self._over, self._engine = event, True, None
        return event

    def cancel(self) -> None:
        """End the answer, from any thread; does nothing if it has ended."""
        self._channel.cancel()

    async def __aenter__(self) -> AsyncAnswer:
        """Return the answer itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the answer."""
        self.cancel()
