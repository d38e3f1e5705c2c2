"""An answer for asyncio, while the engine's thread generates it."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.engine.events import EndEvent, PromptEvent
from llama_onnx.runtime.llama.generation import (
    AnswerEvent,
    FinishEvent,
    Observer,
    TextReader,
)
from llama_onnx.runtime.llama.generation_stats import FinishReason, GenerationStats, Tally

if TYPE_CHECKING:
    from llama_onnx.runtime.engine.answer import AsyncAnswer


class AsyncGeneration(AsyncIterator[str]):
    """The pieces of an answer's text for `async for`; `events()` has its tokens too.

    The model runs when the first piece is requested, in the loop that requests it, and then ahead
    of its reader. `cancel()` ends the answer early, from any thread; so do `aclose()`, leaving an
    `async with` block, and dropping the last reference to the answer. `stats` can be read at any
    time and is final at the end.
    """

    def __init__(
        self,
        submit: Callable[[], AsyncAnswer],
        stream: Any,
        end_tokens: Collection[int],
        stop: Sequence[str],
        prompt_tokens: int,
    ) -> None:
        self._submit: Callable[[], AsyncAnswer] | None = submit
        self._answer: AsyncAnswer | None = None
        self._reader = TextReader(stream, end_tokens, stop)
        self._cancelled = self._over = False
        self._tally = Tally(prompt_tokens)
        self._observer: Observer | None = None

    def observe(self, observer: Observer) -> None:
        """Let `observer` see all events; call it before the first."""
        self._observer = observer
        weakref.finalize(self, observer.end).atexit = False

    def start(self) -> None:
        """Let the model run now, in the running loop; raises what it cannot take.

        Does nothing if it runs already, or was cancelled.
        """
        if self._submit is not None and not self._cancelled:
            self._answer, self._submit = self._submit(), None

    async def __anext__(self) -> str:
        """Return the next piece of text; raise `StopAsyncIteration` at the end of the answer.

        Raises `ResourceError` if memory runs out, and `PackageError` if the model fails.
        """
        while not (text := (await self._take()).text):
            pass
        return text

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """Yield the tokens, each with the text that it adds, and the end; see `Generation.events`.

        An answer that was cancelled ends with a `FinishEvent` too, whose reason is "interrupted".
        """
        while True:
            try:
                event = await self._take()
            except StopAsyncIteration:
                return
            yield event

    async def _take(self) -> AnswerEvent:
        observer = self._observer
        if observer is None:
            return await self._next_event()
        try:
            event = await self._next_event()
        except BaseException:
            observer.end()
            raise
        observer.add(event)
        if isinstance(event, FinishEvent):
            observer.end()
        return event

    async def _next_event(self) -> AnswerEvent:
        if self._over:
            raise StopAsyncIteration
        if self._reader.is_over():
            return self._finish("stop")
        self.start()
        if self._answer is None:
            return self._finish("interrupted")
        try:
            event = await self._answer.__anext__()
        except BaseException:
            self.cancel()
            self._over = True
            raise
        if isinstance(event, PromptEvent):
            self._tally.reused_tokens = event.reused
            self._tally.prefill_seconds = event.seconds
            return await self._next_event()
        if isinstance(event, EndEvent):
            return self._finish("length" if event.reason == "length" else "interrupted")
        self._tally.count(event)
        return self._reader.read(event)

    def _finish(self, reason: FinishReason) -> FinishEvent:
        self._tally.finish_reason, self._over = reason, True
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None
        text = "" if reason == "interrupted" else self._reader.rest()
        return FinishEvent(text, reason, self.stats)

    def cancel(self) -> None:
        """End the answer, from any thread; does nothing if it is over."""
        self._cancelled = True
        if (answer := self._answer) is not None:
            answer.cancel()

    async def aclose(self) -> None:
        """End the answer: nothing comes after this."""
        self.cancel()
        self._over = True
        if self._observer is not None:
            self._observer.end()

    async def __aenter__(self) -> AsyncGeneration:
        """Return the answer itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the answer."""
        await self.aclose()

    @property
    def stats(self) -> GenerationStats:
        """The statistics so far."""
        return self._tally.stats
