"""Progress of a validation: what is being done, steps done, and steps in all."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


def labelled(what: str, progress: Progress | None) -> Callable[[int, int], None]:
    """Return a function that reports steps done and steps in all to `progress` as `what`."""

    def report(done: int, total: int) -> None:
        if progress:
            progress(what, done, total)

    return report
