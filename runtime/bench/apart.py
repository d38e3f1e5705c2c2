"""A package open in a process of its own: its memory is its own, and it may crash alone."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from llama_onnx.runtime.bench.contender import Facts, Here, Opening
from llama_onnx.runtime.bench.timings import Caches, SingleRun, StreamsRun, TurnRun
from llama_onnx.runtime.bench.turns import Script
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError, describe_reason

_PATIENCE = 5.0  # seconds that a process may take to end


class Apart:
    """A package open in another process; see `contender.Contender`."""

    def __init__(self, opening: Opening) -> None:
        """Start the process and open the package there; raises what `Llama.load` raises."""
        self._package = opening.package
        self._pipe, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(there, opening), daemon=True)
        with _interrupts_later():
            self._process.start()
        there.close()
        try:
            self.facts: Facts = self._receive()
        except BaseException:
            self.close()
            raise

    def single(self, prompt_tokens: int, new_tokens: int) -> SingleRun:
        """Generate one answer alone."""
        run: SingleRun = self._call("single", prompt_tokens, new_tokens)
        return run

    def streams(self, count: int, prompt_tokens: int, new_tokens: int) -> StreamsRun:
        """Generate several answers at once."""
        run: StreamsRun = self._call("streams", count, prompt_tokens, new_tokens)
        return run

    def chat(self, number: int, script: Script) -> tuple[TurnRun, ...]:
        """Hold a conversation that no other `number` has."""
        turns: tuple[TurnRun, ...] = self._call("chat", number, script)
        return turns

    def chat_length(self, script: Script) -> int:
        """Return how many tokens a conversation has at most."""
        length: int = self._call("chat_length", script)
        return length

    def peak(self) -> int | None:
        """Return the most bytes of memory that the process has used."""
        size: int | None = self._call("peak")
        return size

    def caches(self) -> Caches | None:
        """Return the bytes of the caches."""
        caches: Caches | None = self._call("caches")
        return caches

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise self._gone() from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(answer, LlamaOnnxError):
            raise answer
        return answer

    def _gone(self) -> ResourceError:
        self._process.join(_PATIENCE)
        code = self._process.exitcode
        return ResourceError(
            f"the process that measures {self._package} ended with status {code}: the system may "
            "have ended it for lack of memory; measure the package alone."
        )


def serve(pipe: Connection, opening: Opening) -> None:
    """Open a package, and run what comes through `pipe` until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    try:
        contender = Here(opening)
        answer: Any = contender.facts
        while True:
            pipe.send(answer)
            name, arguments = pipe.recv()
            answer = _answer(getattr(contender, name), arguments)
    except LlamaOnnxError as error:
        pipe.send(error)
    except (EOFError, OSError):
        return


def _answer(method: Any, arguments: tuple[Any, ...]) -> Any:
    try:
        return method(*arguments)
    except LlamaOnnxError as error:
        return error
    except Exception as error:  # a mistake in this code, which the other process reports
        return LlamaOnnxError(f"measuring failed: {type(error).__name__}: {describe_reason(error)}")


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts, which inherits that: it would print a traceback."""
    held = hasattr(signal, "pthread_sigmask") and (
        threading.current_thread() is threading.main_thread()
    )
    if held:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if held:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
