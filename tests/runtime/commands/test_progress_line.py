"""Progress on a terminal, and none where nobody watches."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.progress_line import ProgressLine
from llama_onnx.targets.progress import SILENT, Progress


def drawn(report: list[tuple[object, ...]]) -> list[str]:
    """The line after each of `report`: arguments of `step` (one) or of `update`."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    lines = []
    with ProgressLine(console) as line:
        for entry in report:
            line.step(*entry) if len(entry) == 1 else line.update(*entry)  # type: ignore[arg-type]
            assert isinstance(console.file, io.StringIO)
            console.file.truncate(console.file.seek(0))
            line.refresh()
            text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]|[╸╺━]", "", console.file.getvalue())
            lines.append(" ".join(text.split()))
    return lines


def test_steps_are_counted() -> None:
    assert drawn([("loading",), ("hashing", 3, 8), ("flushing",)]) == [
        "loading",
        "hashing 3/8",
        "flushing 3/8",
    ]


def test_bytes_have_a_size_and_a_speed() -> None:
    line = drawn([("writing", 10_000_000, 80_000_000, "bytes")])[0]
    assert line.startswith("writing 10.0/80.0 MB ")


def test_another_total_starts_another_bar() -> None:
    amounts: list[tuple[object, ...]] = [("a", 5, 5), ("b", 0, 3), ("c", 1000, 2000, "bytes")]
    assert [line[:10] for line in drawn(amounts)] == ["a 5/5", "b 0/3", "c 1.0/2.0 "]


def test_nothing_is_drawn_where_stderr_is_piped(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_line() as progress:
        assert progress is SILENT
        progress.step("loading")
        progress.update("hashing", 3, 8)
    assert capfd.readouterr() == ("", "")


def test_the_line_is_a_progress() -> None:
    line: Progress = ProgressLine(Console(file=io.StringIO()))
    line.step("not started, so not drawn")
