"""How many answers may be in work or wait, and when a client that finds no place should return."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from llama_onnx.targets.errors import BusyError, UsageError

_REMEMBERED = 32
_LONGEST_WAIT = 60


class Places:
    """Places for answers, of the loop's thread alone; `rows` of them are in work at once."""

    def __init__(self, rows: int, most_waiting: int) -> None:
        self._rows, self._most = rows, rows + most_waiting
        self.taken = 0
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Hold `count` places while the block runs; raise `BusyError` if there are too few."""
        if count > self._most:
            raise UsageError(
                f"the request asks for {count} answers at once, more than the {self._most} that "
                "this server takes: ask for fewer."
            )
        if self.taken + count > self._most:
            raise BusyError("too many requests are waiting: try again later.")
        self.taken += count
        started = monotonic()
        try:
            yield
        finally:
            self.taken -= count
            self._seconds.append(monotonic() - started)

    def retry_after(self) -> int:
        """Return after how many seconds a place is likely to be free, at least 1."""
        if not self._seconds:
            return 1
        mean = sum(self._seconds) / len(self._seconds)
        return max(1, min(_LONGEST_WAIT, math.ceil(mean / self._rows)))
