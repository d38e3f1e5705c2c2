"""What a long operation reports while it runs. Commands draw it; libraries stay silent by default.

This module has only the protocol, so that every part of the project can accept one;
`runtime/commands/progress_line.py` has the drawing.
"""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["steps", "bytes"]


class Progress(Protocol):
    """Receives what a long operation is doing.

    >>> class Printed:
    ...     def step(self, what):
    ...         print(what)
    ...     def update(self, what, done, total, unit="steps"):
    ...         print(f"{what}: {done} of {total} {unit}")
    >>> progress: Progress = Printed()
    >>> progress.update("hashing", 3, 8, "bytes")
    hashing: 3 of 8 bytes
    """

    def step(self, what: str) -> None:
        """Report that `what` begins; how long it takes is not known."""

    def update(self, what: str, done: int, total: int, unit: Unit = "steps") -> None:
        """Report that `done` of `total` are finished; `what` is being worked on."""


class Silent:
    """A `Progress` that draws nothing; also the base class for those that need one method only."""

    def step(self, what: str) -> None:
        """Ignore it."""

    def update(self, what: str, done: int, total: int, unit: Unit = "steps") -> None:
        """Ignore it."""


SILENT: Progress = Silent()
"""The default wherever a `Progress` is accepted."""
