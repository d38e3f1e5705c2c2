"""Work for the engine's thread that is not an answer, and its result for whoever waits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

_T = TypeVar("_T")

_PATIENCE = 1.0
"""Seconds between two looks at Ctrl-C, which Windows does not see in a longer wait."""


class Errand(Generic[_T]):
    """A function that the engine's thread calls between two steps."""

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._result: Future[_T] = Future()

    def run(self) -> None:
        """Call the function, in the engine's thread."""
        try:
            self._result.set_result(self._function())
        except Exception as error:
            self._result.set_exception(error)

    def fail(self, error: BaseException) -> None:
        """Tell whoever waits that the function will not be called."""
        self._result.set_exception(error)

    def wait(self) -> _T:
        """Return what the function returned, or raise what it raised."""
        while True:
            try:
                return self._result.result(timeout=_PATIENCE)
            except NotYet:
                continue
