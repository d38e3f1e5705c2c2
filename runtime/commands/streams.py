"""Stdin, stdout and stderr of a command: what comes in is checked, what goes out is safe to show.

Names of tensors and files, errors that quote them and generated text may hold anything, also
sequences that a terminal obeys. `say`, `show_answer` and `tables.make_console` print them.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import IO

import click

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import printable

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it: 128 plus the number of the signal."""

_MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
"""Encodings other than UTF-8, and how their texts begin. UTF-16's mark starts one of UTF-32's."""


@contextlib.contextmanager
def interrupts_end_imports() -> Iterator[None]:
    """Let Ctrl-C during an import end the process at once; otherwise it raises KeyboardInterrupt.

    Libraries turn an exception inside their import into other ones, or into a long traceback.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    previous = signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def prepare_streams() -> None:
    """Make stdout and stderr write UTF-8, unless they are a terminal, and never fail to encode.

    A pipe has the code page of the machine on Windows, in which most characters are lost. A byte
    of a file name that is not UTF-8 is shown as an escape, which is valid in JSON too.
    """
    for stream in (sys.stdout, sys.stderr):
        if not hasattr(stream, "reconfigure"):
            continue
        if stream.isatty():
            stream.reconfigure(errors="backslashreplace")
        else:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def occupy_closed_files() -> None:
    """Open the null device in place of a stdin, stdout or stderr that the caller closed.

    Otherwise the next file that is opened, a package's data perhaps, would be taken for it by
    libraries that print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)


def finish_streams(status: int) -> int:
    """Write what is still buffered; return the exit status, 1 instead of 0 if that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            # The interpreter tries again at its end and would print a traceback.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            status = status or 1
    return status


def say(text: str = "", *, err: bool = False) -> None:
    """Print a line of text that may quote anything."""
    try:
        click.echo(printable(text), err=err)
    except OSError:
        if not err:  # if nobody reads stderr, there is nobody to tell
            raise


def show_answer(piece: str) -> None:
    """Print a piece of generated text: as it is to a pipe or a file, where it is data, and without
    anything that a terminal could obey to a terminal."""
    if sys.stdout is None:  # closed by the caller
        return
    # Not by click, which takes colors out of what goes to a pipe.
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


# ---- input ---------------------------------------------------------------------------------------


def read_stdin() -> str:
    """Return all of stdin as text. Raises `UsageError` if it is closed or not UTF-8."""
    return decode_input(_stdin().read())


def read_lines() -> Iterator[str]:
    """Yield the lines of stdin as they arrive. Raises `UsageError` like `read_stdin`."""
    first = True
    for line in _stdin():
        yield decode_input(line, first=first)
        first = False


def decode_input(content: bytes, *, first: bool = True) -> str:
    """Return the text of `content`, UTF-8 from a pipe, without a byte order mark at its start.

    Raises `UsageError` for other encodings.
    """
    for encoding, marks in _MARKS.items():
        if first and content.startswith(marks):
            raise UsageError(f"the text on stdin is {encoding}: convert it to UTF-8 first.")
    try:
        return content.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the text on stdin is not UTF-8 (at byte {error.start:,}): convert it first."
        ) from None


def check_stdin() -> None:
    """Raise `UsageError` if there is no stdin."""
    _stdin()


def _stdin() -> IO[bytes]:
    if sys.stdin is None:
        raise UsageError("there is no stdin: pass the text as an argument, or open stdin.")
    return sys.stdin.buffer
