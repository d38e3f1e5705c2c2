"""`llama-onnx chat`: chat in the terminal or through a pipe."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.runtime.commands.console import introduce, note, stream, summary
from llama_onnx.runtime.commands.options import (
    adapter_option,
    engine_option,
    package_argument,
    provider_options,
    sampling_options,
    speculation_options,
    threads_option,
)
from llama_onnx.runtime.commands.streams import check_stdin, read_lines
from llama_onnx.runtime.llama.conversation import OVERFLOWS, Overflow
from llama_onnx.targets.errors import ContextLengthError, UsageError

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.dialogue import Conversation
    from llama_onnx.runtime.llama.model import Llama
    from llama_onnx.runtime.llama.saving import SessionReport
    from llama_onnx.targets.engines import EngineName
    from llama_onnx.targets.provider import Provider


@click.command("chat")
@package_argument
@click.option("--system", help="System message at the start of the conversation.")
@adapter_option
@click.option(
    "--overflow",
    type=click.Choice(OVERFLOWS),
    default="drop_oldest",
    show_default=True,
    help="When the context is full: leave the oldest messages out, or end with an error.",
)
@click.option(
    "--session",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Go on with the conversation in FILE, if there is one, and save it there at the end.",
)
@click.option(
    "--messages-only",
    is_flag=True,
    help="Take only the messages from FILE, also those of another package.",
)
@sampling_options(max_new_tokens=512)
@engine_option
@speculation_options
@threads_option
@provider_options
def command(
    package: Path,
    system: str | None,
    adapter: str | None,
    overflow: Overflow,
    session: Path | None,
    messages_only: bool,
    engine: EngineName | None,
    drafting: dict[str, Any],
    threads: int | None,
    provider: Provider | None,
    allow_fallback: bool,
    **answering: Any,
) -> None:
    """Chat with the model in PACKAGE.

    Ctrl-C ends an answer. Ctrl-C or Ctrl-D at the prompt, or /exit, ends the conversation. When
    stdin is not a terminal, each of its lines is a message.
    """
    from llama_onnx.runtime.llama.model import Llama

    check_stdin()
    if session is None and messages_only:
        raise UsageError("--messages-only has no effect without --session: leave it out.")
    model = Llama.load(
        package,
        threads=threads,
        provider=provider,
        allow_fallback=allow_fallback,
        engine=engine,
        **drafting,
    )
    model.package.require_tokenizer()
    lines = read_lines()
    if session is None:
        conversation = model.conversation(system=system, adapter=adapter, overflow=overflow)
    else:
        conversation = _open_session(model, session, system, adapter, overflow, messages_only)
    introduce(model, conversation.adapter)
    before = conversation.messages
    try:
        for message in _messages(lines):
            _answer(model, conversation, message, answering)
    finally:
        if session is not None and conversation.messages != before:
            _tell("saved", conversation.save(session))


def _answer(model: Llama, conversation: Conversation, message: str, options: Any) -> None:
    """Print the answer to a message, and what was left out for it."""
    known = len(conversation.dropped)
    context = f"context of {model.context_length:,} tokens"
    try:
        answer = conversation.say(message, **options)
    except ContextLengthError:
        if conversation.overflow == "error":
            raise
        note(f"(The message is longer than the {context}.)")
        return
    if dropped := len(conversation.dropped) - known:
        note(f"(The {context} is full: the oldest {dropped} messages were dropped.)")
    stream(answer)
    note(summary(answer.stats))


def _open_session(
    model: Llama,
    file: Path,
    system: str | None,
    adapter: str | None,
    overflow: Overflow,
    messages_only: bool,
) -> Conversation:
    """Return the conversation in `file`, or a new one if there is no such file."""
    from llama_onnx.runtime.llama.session_file import check_writable

    logging.getLogger("llama_onnx.session").addHandler(logging.NullHandler())  # notes say it
    check_writable(file)
    if not file.exists():
        return model.conversation(system=system, adapter=adapter, overflow=overflow)
    restored = model.restore(file, adapter=adapter, overflow=overflow, messages_only=messages_only)
    first = restored.messages[:1]
    said = first[0]["content"] if first and first[0]["role"] == "system" else None
    if system not in (None, said):
        raise UsageError(
            f"{file} begins with another system message: leave out --system, or choose another "
            "file."
        )
    if restored.restored is not None:
        _tell("restored", restored.restored)
    return restored


def _tell(done: str, report: SessionReport) -> None:
    """Print what was saved or restored."""
    why = f", because {report.left_out}" if report.left_out else ""
    note(
        f"({report.path}: {report.messages:,} messages and the cache of {report.positions:,} "
        f"tokens {done}{why}.)"
    )


def _messages(lines: Iterator[str]) -> Iterator[str]:
    """Yield each message that the user types, until the end of the conversation."""
    try:
        while (message := _read_line(lines).strip()) != "/exit":
            if message:
                yield message
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)


def _read_line(lines: Iterator[str]) -> str:
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` line editing and a history
        return input("> ")
    for line in lines:
        return line
    raise EOFError
