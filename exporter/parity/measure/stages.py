"""How long the stages of a validation take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TypeVar

_T = TypeVar("_T")


class Stages:
    """Adds up the wall-clock `seconds` of each stage, by name, in the order of their first use."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to `stage`."""
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - started

    def each(self, stage: str, items: Iterator[_T]) -> Iterator[_T]:
        """Yield `items`, and add the time that it takes to make them to `stage`."""
        ended = object()
        while True:
            with self.timed(stage):
                item = next(items, ended)
            if item is ended:
                return
            yield item  # type: ignore[misc]
