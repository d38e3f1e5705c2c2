"""A time limit for a call into a library that has none."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread, stack_size
from typing import TypeVar

_Result = TypeVar("_Result")

_STACK = Lock()
"""Python has one stack size for all new threads."""


def within(seconds: float, work: Callable[[], _Result], *, stack_bytes: int = 0) -> _Result:
    """Return what `work` returns, or raise what it raises; `TimeoutError` after `seconds`.

    Then `work` goes on in its thread, which nobody can end, but which does not keep the process.
    `stack_bytes` is the size of its stack, for a library that recurses as deep as its input is
    nested: where the stack ends, so does the process. 0 is the system's default.
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
    with _STACK:
        before = stack_size(stack_bytes or stack_size())
        try:
            thread.start()
        finally:
            stack_size(before)
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]
