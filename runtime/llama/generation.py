"""An answer while it is generated: text, piece by piece, and the time it took."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from typing import Any, Protocol, TypeAlias

import numpy as np

from llama_onnx.runtime.engine.events import TokenEvent
from llama_onnx.runtime.engine.failures import describe_failure, require_finite
from llama_onnx.runtime.engine.schedule import CHUNK
from llama_onnx.runtime.llama.generation_stats import FinishReason, GenerationStats, Tally
from llama_onnx.runtime.llama.prompt import Tokens
from llama_onnx.runtime.llama.stops import StopFilter
from llama_onnx.runtime.tokenizer.text_stream import TextStream


@dataclass(frozen=True)
class TextEvent:
    """The next token of an answer.

    `text` is what it adds to the text that can be shown: nothing where it is a part of a
    character, an end token, or may be the start of a stop text, which a later event then brings.
    `logprobs` has its log probabilities if they were asked for (`TokenLogprobs`), else None.
    """

    token: int
    text: str
    logprobs: Any = None


@dataclass(frozen=True)
class FinishEvent:
    """The end of an answer: the text that was held back until now, and why it is the end."""

    text: str
    finish_reason: FinishReason
    stats: GenerationStats


AnswerEvent: TypeAlias = TextEvent | FinishEvent


class Events(Protocol):
    """The events of an answer, which ends where they are closed."""

    def __next__(self) -> AnswerEvent:
        """Return the next event; raise `StopIteration` after the last."""

    def close(self) -> None:
        """End the answer and free what it took."""


class Observer(Protocol):
    """Sees an answer as its reader does; it must not refer to the answer."""

    def add(self, event: AnswerEvent) -> None:
        """Take an event, just before the reader gets it."""

    def end(self) -> None:
        """Take note that nothing comes any more: at the end, after `close` or an error, and when
        the answer is dropped; perhaps several times, and from any thread."""


class Observed(Events):
    """Events that an observer sees too."""

    def __init__(self, events: Events, observer: Observer) -> None:
        self._inner, self._observer = events, observer

    def __next__(self) -> AnswerEvent:
        """Return the next event, and end with the last."""
        try:
            event = next(self._inner)
        except BaseException:
            self._observer.end()
            raise
        self._observer.add(event)
        if isinstance(event, FinishEvent):
            self.close()
        return event

    def close(self) -> None:
        """End the answer."""
        self._inner.close()
        self._observer.end()


class TextReader:
    """Turns the tokens of one answer into text, up to an end token or the first stop text."""

    def __init__(
        self, stream: TextStream, end_tokens: Collection[int], stop: Sequence[str] = ()
    ) -> None:
        self._stream, self._end_tokens, self._stops = stream, end_tokens, StopFilter(stop)
        self._ended = False

    def is_over(self) -> bool:
        """Return whether an end token or a stop text has come."""
        return self._ended or self._stops.stopped

    def read(self, step: TokenEvent) -> TextEvent:
        """Return the event for the next token."""
        if step.token in self._end_tokens:
            self._ended = True
            return TextEvent(step.token, "", step.logprobs)
        text = self._stops.feed(self._stream.decode(step.token))
        return TextEvent(step.token, text, step.logprobs)

    def rest(self) -> str:
        """Return what is still held back at the end of the answer."""
        text = "" if self.is_over() else self._stops.feed(self._stream.finish())
        return text + self._stops.flush()


class Steps(Tally, ABC):
    """What generates one answer, driven step by step, and what it has taken so far."""

    cancelled = False

    @abstractmethod
    def prefill(self) -> None:
        """Read the prompt."""

    @abstractmethod
    def is_done(self) -> bool:
        """Return whether the answer is as long as it can become."""

    @abstractmethod
    def step(self) -> TokenEvent | None:
        """Generate a token and return it; None if the answer was cancelled instead."""

    @abstractmethod
    def cancel(self) -> None:
        """End the answer before its next step, from any thread."""

    @abstractmethod
    def free(self) -> None:
        """Free the cache."""


class Run(Steps):
    """The native generator of onnxruntime-genai, which holds Python's lock while it reads."""

    def __init__(self, native: Any, prompt: Tokens, on_cpu: bool) -> None:
        super().__init__(len(prompt))
        self._native, self._prompt, self._on_cpu = native, prompt, on_cpu

    def prefill(self) -> None:
        """Read the prompt, in chunks between which another thread or Ctrl-C can end the answer."""
        started = perf_counter()
        for part in chunks(self._prompt) if self._on_cpu else [self._prompt]:
            if self.cancelled:
                return
            self._native.append_tokens(part)
        self.prefill_seconds = perf_counter() - started

    def is_done(self) -> bool:
        """Return whether the answer is as long as it can become."""
        return bool(self._native.is_done())

    def step(self) -> TokenEvent:
        """Generate a token and return it; raise `PackageError` if the logits are not numbers."""
        started = perf_counter()
        # From another device the logits would have to be copied: only the first are.
        if self._on_cpu or not self.step_seconds:
            require_finite(self._native.get_logits(), len(self.step_seconds))
        self._native.generate_next_token()
        token = int(self._native.get_next_tokens()[0])
        event = TokenEvent(token, None, perf_counter() - started)
        self.count(event)
        return event

    def cancel(self) -> None:
        """End the answer before its next step, from any thread."""
        self.cancelled = True

    def free(self) -> None:
        """Free the native generator and its cache."""
        self._native = None


def chunks(prompt: Tokens) -> list[Tokens]:
    """Return the prompt in parts of nearly equal length, none longer than `CHUNK`.

    Nearly equal: a rest of one token would be computed by another kernel than the others.
    """
    return np.array_split(prompt, max(1, -(-len(prompt) // CHUNK)))


class Generation(Iterator[str]):
    """An iterator over the pieces of an answer's text; `events()` has its tokens too.

    `stats` can be read at any time and is final at the end. `close()` ends the answer early and
    frees its cache; so do leaving a `with` block, and dropping the last reference to the answer, as
    `break` does in a loop over `model.generate(...)`.

    Any thread may call `close()`. An answer that another thread is computing ends before its next
    token, or on the CPU before the next 512 tokens of its prompt.
    """

    def __init__(
        self,
        generator: Any,
        stream: Any,
        prompt: Tokens,
        end_tokens: Collection[int],
        stop: Sequence[str] = (),
        *,
        length: int = 0,
        on_cpu: bool = True,
    ) -> None:
        """Take a native generator that has read nothing; `length` is the most tokens in all."""
        self._start(Run(generator, prompt, on_cpu), stream, end_tokens, stop, length)

    @classmethod
    def of(
        cls,
        run: Steps,
        stream: Any,
        end_tokens: Collection[int],
        stop: Sequence[str] = (),
        *,
        length: int = 0,
    ) -> Generation:
        """Return the answer that `run` generates."""
        answer = cls.__new__(cls)
        answer._start(run, stream, end_tokens, stop, length)
        return answer

    def _start(
        self,
        run: Steps,
        stream: Any,
        end_tokens: Collection[int],
        stop: Sequence[str],
        length: int,
    ) -> None:
        self._lock = Lock()
        self._length = length
        # No cycle of references: `_events` has the run, not this object. So the native generator
        # and its KV cache are freed with the last reference, not when garbage is collected.
        self._run = run
        self._events: Events = _events(run, TextReader(stream, end_tokens, stop))

    def observe(self, observer: Observer) -> None:
        """Let `observer` see all events; call it before the first."""
        self._events = Observed(self._events, observer)
        weakref.finalize(self, observer.end).atexit = False

    def __next__(self) -> str:
        """Return the next piece of text; raise `StopIteration` at the end of the answer.

        Raises `ResourceError` if memory runs out, and `PackageError` if the model fails.
        """
        while not (text := self._take().text):
            pass
        return text

    def events(self) -> Iterator[AnswerEvent]:
        """Return an iterator over the tokens, each with the text that it adds, and the end.

        Raises as `__next__` does. An answer that `close()` ends has no `FinishEvent`.

        Examples:
            >>> answer = llama_onnx.Llama.load("tiny-int4").generate("the fox", max_new_tokens=4)
            >>> *tokens, end = answer.events()
            >>> len(tokens), end.finish_reason
            (4, 'length')
        """
        while True:
            try:
                event = self._take()
            except StopIteration:
                return
            yield event

    def _take(self) -> AnswerEvent:
        try:
            with self._lock:
                return next(self._events)
        except (RuntimeError, MemoryError) as error:
            failure = describe_failure(error, self._run.prompt_tokens, self._length)
        finally:
            if self._run.cancelled:
                self.close()
        raise failure  # outside: it must not keep the library's error, and the cache with it

    def __enter__(self) -> Generation:
        """Return the answer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the answer and free its cache."""
        self.close()

    def close(self) -> None:
        """End the answer and free its cache, from any thread."""
        self._run.cancel()
        # If another thread holds the lock, it sees `cancelled`, and calls `close` afterwards.
        if self._lock.acquire(blocking=False):
            try:
                self._events.close()
                self._run.free()
            finally:
                self._lock.release()

    @property
    def stats(self) -> GenerationStats:
        """The statistics so far."""
        return self._run.stats


def _events(run: Steps, reader: TextReader) -> Generator[AnswerEvent, None, None]:
    try:
        run.prefill()
        while not (run.cancelled or run.is_done() or reader.is_over()):
            step = run.step()
            if step is None:
                return
            event = reader.read(step)
            if reader.is_over():
                run.finish_reason = "stop"
            yield event
        if run.cancelled:
            return
        if not reader.is_over():
            run.finish_reason = "length"
        yield FinishEvent(reader.rest(), run.finish_reason, run.stats)
    finally:
        # Also after an error: its traceback keeps this frame, which must not keep the cache.
        run.free()
