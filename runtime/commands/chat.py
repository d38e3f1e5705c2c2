"""`llama-onnx chat`: chat in the terminal or through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
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

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.conversation import Message
    from llama_onnx.runtime.llama.model import Llama
    from llama_onnx.targets.engines import EngineName
    from llama_onnx.targets.provider import Provider


@click.command("chat")
@package_argument
@click.option("--system", help="System message at the start of the conversation.")
@adapter_option
@sampling_options(max_new_tokens=512)
@engine_option
@speculation_options
@threads_option
@provider_options
def command(
    package: Path,
    system: str | None,
    adapter: str | None,
    engine: EngineName,
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
    if adapter is not None:
        # Refuse a wrong name now, not after the first message.
        model.package.adapter_path(adapter)
    introduce(model, adapter)
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    for message in _messages(lines):
        messages = [*history, {"role": "user", "content": message}]
        fitting = _fit(model, messages, answering["max_new_tokens"])
        if fitting is None:
            continue
        answer = model.chat(fitting, adapter=adapter, **answering)
        text = stream(answer)
        note(summary(answer.stats))
        history = [*fitting, {"role": "assistant", "content": text}]


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


def _fit(model: Llama, messages: Sequence[Message], max_new_tokens: int) -> list[Message] | None:
    """Drop old messages until an answer has room; return None if even the new one is too long."""
    from llama_onnx.runtime.llama.conversation import trim_history

    # A large `--max-new-tokens` must not displace the whole history: reserve a quarter at most.
    room = min(max_new_tokens, model.context_length // 4)

    def fits(messages: Sequence[Message]) -> bool:
        return len(model.encode_chat(messages)) + room <= model.context_length

    kept = trim_history(messages, fits)
    if len(model.encode_chat(kept)) >= model.context_length:
        note(f"(The message is longer than the context of {model.context_length:,} tokens.)")
        return None
    if dropped := len(messages) - len(kept):
        note(
            f"(The context of {model.context_length:,} tokens is full: "
            f"the oldest {dropped} messages were dropped.)"
        )
    return kept
