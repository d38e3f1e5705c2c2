"""Draw progress with rich. `console.progress_line` decides whether to draw at all."""

from __future__ import annotations

from types import TracebackType

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars

from llama_onnx.targets.progress import Unit


class ProgressLine:
    """A `Progress` drawn as one line: the step, a bar, the amount done. A context manager.

    For bytes it also shows the speed and the remaining time. The line disappears at the end.
    """

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description:<40}", markup=False),
            BarColumn(),
            _Amount(),
            console=console,
            transient=True,
        )
        self._task = self._bars.add_task("starting", total=None, unit="steps")

    def __enter__(self) -> ProgressLine:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def refresh(self) -> None:
        """Draw the line now; it is also drawn ten times a second."""
        self._bars.refresh()

    def step(self, what: str) -> None:
        """Show `what` and leave the bar unchanged."""
        self._bars.update(self._task, description=what)

    def update(self, what: str, done: int, total: int, unit: Unit = "steps") -> None:
        """Show `what` and how much is done."""
        task = self._bars.tasks[0]
        if task.fields["unit"] != unit or task.total != total:
            # A new total: the speed measured so far does not apply to it.
            self._bars.reset(self._task, total=total, description=what, unit=unit)
        self._bars.update(self._task, description=what, completed=done)


class _Amount(ProgressColumn):
    """The amount done and the total, in columns for the task's unit; empty without a total."""

    def __init__(self) -> None:
        super().__init__()
        self._columns: dict[Unit, tuple[ProgressColumn, ...]] = {
            "steps": (MofNCompleteColumn(),),
            "bytes": (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()),
        }

    def render(self, task: Task) -> RenderableType:
        if task.total is None:
            return ""
        return Columns([column(task) for column in self._columns[task.fields["unit"]]])
