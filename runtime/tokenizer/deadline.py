"""A time limit for a call into a library that has none."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import TypeVar

_Result = TypeVar("_Result")


def within(seconds: float, work: Callable[[], _Result]) -> _Result:
    """Return what `work` returns, or raise what it raises; `TimeoutError` after `seconds`.

    Then `work` goes on in its thread, which nobody can end, but which does not keep the process.
    The library must let other threads run meanwhile.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # Rust's panic is not an Exception
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
