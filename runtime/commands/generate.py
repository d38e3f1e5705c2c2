"""`llama-onnx generate`: answer one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.runtime.commands.console import collect, introduce, note, stream, summary
from llama_onnx.runtime.commands.options import (
    adapter_option,
    engine_option,
    package_argument,
    provider_options,
    sampling_options,
    speculation_options,
    threads_option,
)
from llama_onnx.runtime.commands.streams import read_stdin

if TYPE_CHECKING:
    from llama_onnx.targets.engines import EngineName
    from llama_onnx.targets.provider import Provider


@click.command("generate")
@package_argument
@click.argument("prompt")
@click.option(
    "--chat/--raw",
    help="Treat PROMPT as a user's message, or as a text to continue.  [default: raw]",
)
@adapter_option
@sampling_options(max_new_tokens=256)
@engine_option
@speculation_options
@threads_option
@provider_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print text and statistics as one JSON object."
)
def command(
    package: Path,
    prompt: str,
    chat: bool,
    adapter: str | None,
    engine: EngineName | None,
    drafting: dict[str, Any],
    threads: int | None,
    provider: Provider | None,
    allow_fallback: bool,
    as_json: bool,
    **answering: Any,
) -> None:
    """Let the model in PACKAGE continue or answer PROMPT ("-" reads it from stdin).

    The text goes to stdout as it is generated, the statistics to stderr.
    """
    from llama_onnx.runtime.llama.model import Llama

    # The shell adds the newline at the end of a piped line; it is not part of the prompt.
    text = read_stdin().removesuffix("\n") if prompt == "-" else prompt
    model = Llama.load(
        package,
        threads=threads,
        provider=provider,
        allow_fallback=allow_fallback,
        engine=engine,
        **drafting,
    )
    if chat:
        answer = model.chat([{"role": "user", "content": text}], adapter=adapter, **answering)
    else:
        answer = model.generate(text, adapter=adapter, **answering)
    if as_json:
        result = {
            "text": collect(answer),
            "engine": model.backend.name,
            "provider": model.opened.to_json(),
            "adapter": adapter,
            "stats": answer.stats.to_json(),
        }
        click.echo(json.dumps(result))
    else:
        introduce(model, adapter)
        stream(answer)
        note(summary(answer.stats))
    if answer.stats.finish_reason == "interrupted":
        click.get_current_context().exit(1)
