"""The bounds of one rendering: steps, processor time, sizes. A template comes from a stranger."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

MOST_STEPS = 2_000_000
MOST_SECONDS = 2.0
"""Of processor time, for reading a template and for each rendering."""

_TEXT, _ITEMS, _DEPTH, _BITS = 1 << 20, 50_000, 100, 1 << 16
_MEMORY = 128 << 20
_OBJECT = 56
"""About the bytes that a small object takes."""


class TooMuchError(Exception):
    """A template exceeds a bound; the text says which."""

    @classmethod
    def text(cls) -> TooMuchError:
        """Return the error for a text, list or number that would be too large."""
        return cls("it makes a value that is too large")


class Meter:
    """Counts what one rendering does; its methods raise `TooMuchError`.

    `text` is the most characters that a value may have. Sizes may grow with `given`, the values
    that the template is called with.
    """

    def __init__(self, given: Any = None) -> None:
        self._steps = self._produced = 0
        self._end = time.thread_time() + MOST_SECONDS
        self._items = self.text = sys.maxsize
        items, text = self.weigh(given)
        self._items, self.text = _ITEMS + 8 * items, _TEXT + 4 * text
        self._memory = _MEMORY + 64 * text

    def tick(self) -> None:
        """Count a step."""
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise TooMuchError("it takes too many steps")
        if time.thread_time() > self._end:
            raise TooMuchError("it takes too long")

    def need(self, size: int) -> None:
        """Check the size of a value before it is made."""
        if size > self.text:
            raise TooMuchError.text()

    def weigh(self, value: Any) -> tuple[int, int]:
        """Return the numbers of objects and of characters in `value`, with repetitions: to print or
        compare a value visits what it holds twice two times."""
        if isinstance(value, (str, bytes)):
            self.need(len(value))
            return 1, len(value)
        items = text = 0
        stack: list[tuple[Any, int]] = [(value, 0)]
        while stack:
            one, depth = stack.pop()
            items += 1
            if isinstance(one, (str, bytes)):
                text += len(one)
                self.need(text)
            elif isinstance(one, int):
                self._check_number(one)
            elif (children := _children(one)) is not None:
                if depth >= _DEPTH or items + len(stack) + len(children) > self._items:
                    raise TooMuchError.text()
                stack += [(child, depth + 1) for child in children]
        return items, text

    def produce(self, value: Any, *given: Any) -> Any:
        """Check a new value and count its memory, unless it is one of `given`; return it."""
        if any(value is one for one in given):
            return value
        self.weigh(value)
        self._produced += sys.getsizeof(value)
        if isinstance(value, (list, tuple, dict)):
            self._produced += _OBJECT * len(value)
        if self._produced > self._memory:
            raise TooMuchError("it makes too many values")
        return value

    def _check_number(self, number: int) -> None:
        if number.bit_length() > _BITS:
            raise TooMuchError.text()


def _children(value: Any) -> Sequence[Any] | None:
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (Set, ValuesView)):  # a dictionary's keys and items are sets
        return list(value)
    return None


_current: ContextVar[Meter] = ContextVar("meter")


def current() -> Meter:
    """Return the meter of what is rendered or compiled in this thread."""
    return _current.get()


@contextmanager
def metered(given: Any = None) -> Iterator[Meter]:
    """Measure what happens inside; a template gets `given`."""
    token = _current.set(Meter(given))
    try:
        yield _current.get()
    finally:
        _current.reset(token)
