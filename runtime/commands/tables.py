"""Tables and styled lines that may quote anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from llama_onnx.targets.printable import printable


class _SafeConsole(Console):
    """Shows the text of every table and line as it is: no markup, no control sequences."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def make_console(*, stderr: bool = False, file: IO[str] | None = None, **options: Any) -> Console:
    """Return a console for tables and lines that may quote anything. `options` are rich's.

    Markup such as "[red]" is not interpreted: style a line with `rich.text.Text`.
    """
    return _SafeConsole(
        stderr=stderr, file=file, markup=False, emoji=False, highlight=False, **options
    )
