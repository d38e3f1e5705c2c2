"""Progress bars on a terminal's stderr; nothing at all when stderr is piped."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress


class ExportBar:
    """Draws an export: what, how much, how fast, how long. Use as a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ExportBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def start(self, total_bytes: int) -> None:
        """Draw the bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("writing", total=total_bytes)

    def advance(self, what: str, num_bytes: int) -> None:
        """Move it on."""
        if self._task is not None:
            self._bar.update(self._task, advance=num_bytes, description=f"{what:<40}")

    def step(self, text: str) -> None:
        """Say what is going on before and behind the weights."""
        if self._task is None:
            self._task = self._bar.add_task("", total=None)
        self._bar.update(self._task, description=f"{text:<40}")
