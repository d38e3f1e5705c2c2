"""Print answers to stdout, and information about them to stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from llama_onnx.runtime.commands.streams import show_answer
from llama_onnx.targets.printable import printable
from llama_onnx.targets.progress import SILENT, Progress

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.generation import Generation
    from llama_onnx.runtime.llama.generation_stats import GenerationStats
    from llama_onnx.runtime.llama.model import Llama


def stream(answer: Generation) -> str:
    """Print an answer as it is generated, and return it."""
    text = collect(answer, show_answer)
    click.echo()
    return text


def collect(answer: Generation, show: Callable[[str], None] = lambda _: None) -> str:
    """Return an answer's text; `show` gets each piece. Ctrl-C ends the answer, not the program."""
    text = ""
    try:
        for piece in answer:
            text += piece
            show(piece)
    except KeyboardInterrupt:
        answer.close()
    return text


def note(text: str) -> None:
    """Print a remark about an answer."""
    click.secho(printable(text), dim=True, err=True)


def introduce(model: Llama, adapter: str | None = None) -> None:
    """Print which model runs on which provider, and why if it is not the requested provider."""
    named = f"{model} · adapter {adapter}" if adapter else str(model)
    introduce_opened(named, model.opened.fallback, model.opened.tuned)


def introduce_opened(model: str, fallback: str | None, tuned: str | None) -> None:
    """Print the same of a model that is open elsewhere."""
    note(model)
    if fallback:
        note(f"{fallback} The CPU runs it instead, as --allow-fallback allows.")
    if tuned:
        note(tuned)


def summary(stats: GenerationStats) -> str:
    """Return the statistics in one line."""
    drafted = ""
    if stats.drafted_tokens:
        drafted = f" ({stats.accepted_tokens} of {stats.drafted_tokens} drafted accepted)"
    known = f" ({stats.reused_tokens} known)" if stats.reused_tokens else ""
    return (
        f"prompt {stats.prompt_tokens} tokens{known}, {_speed(stats.prefill_rate)}"
        f" · first token after {stats.first_token_seconds:.2f} s"
        f" · answer {stats.new_tokens} tokens{drafted}, {_speed(stats.decode_rate)}"
        f" · {stats.finish_reason}"
    )


def _speed(rate: float | None) -> str:
    return "- tok/s" if rate is None else f"{rate:.1f} tok/s"


@contextmanager
def progress_line() -> Iterator[Progress]:
    """Draw one line of progress on stderr while the block runs, if stderr is a terminal."""
    from llama_onnx.runtime.commands.tables import make_console

    console = make_console(stderr=True)
    if not console.is_terminal:
        yield SILENT
        return
    from llama_onnx.runtime.commands.progress_line import ProgressLine

    with ProgressLine(console) as line:
        yield line
