"""`llama-onnx bench`: measure how fast a package is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.options import (
    engine_option,
    package_argument,
    provider_options,
    threads_option,
)
from llama_onnx.runtime.commands.streams import say

if TYPE_CHECKING:
    from rich.table import Table

    from llama_onnx.runtime.bench.bench import Bench, Spread
    from llama_onnx.targets.engines import EngineName
    from llama_onnx.targets.provider import Provider


@click.command("bench")
@package_argument
@click.option("--prompt-tokens", type=int, help="Tokens in the prompt.  [default: 512]")
@click.option("--new-tokens", type=int, help="Tokens to generate.  [default: 64]")
@click.option("--repeats", type=int, default=5, show_default=True, help="Runs to measure.")
@engine_option
@threads_option
@provider_options
@click.option("--json", "as_json", is_flag=True, help="Print all measurements as JSON.")
def command(
    package: Path,
    prompt_tokens: int | None,
    new_tokens: int | None,
    repeats: int,
    engine: EngineName,
    threads: int | None,
    provider: Provider | None,
    allow_fallback: bool,
    as_json: bool,
) -> None:
    """Measure PACKAGE on this machine: speed, time to the first token, memory.

    Prints the medians of several runs, in the engine that `generate` uses too, after one warm-up
    run.
    """
    from llama_onnx.runtime.bench.bench import bench

    with progress_line() as progress:
        measured = bench(
            package,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            provider=provider,
            allow_fallback=allow_fallback,
            engine=engine,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(measured.to_json()))
    else:
        _print(measured)


def _print(measured: Bench) -> None:
    from llama_onnx.runtime.commands.tables import make_console

    say(
        f"{Path(measured.package).resolve().name} · {measured.precision} · "
        f"{measured.provider['onnxruntime']} · prompt {measured.prompt_tokens}, "
        f"answer {measured.new_tokens} tokens"
    )
    if measured.provider["fallback"]:
        say(f"{measured.provider['fallback']} The CPU ran it instead.")
    make_console().print(_table(measured))


def _table(measured: Bench) -> Table:
    from rich import box
    from rich.table import Column, Table

    columns = "", Column("median", justify="right"), Column("range", justify="right")
    runs = f"{measured.repeats} runs" if measured.repeats > 1 else "one run"
    title = f"{runs}, engine {measured.engine}"
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_row("first token", *_row(measured.first_token_seconds, "s", 3))
    table.add_row("prefill", *_row(measured.prefill_rate, "tokens/s", 1))
    if measured.decode_rate:
        table.add_row("decode", *_row(measured.decode_rate, "tokens/s", 1))
    table.add_row("load (one run)", f"{measured.load_seconds:.2f} s", "")
    if measured.resident is not None and measured.peak is not None:
        table.add_row("memory after loading", f"{measured.resident / 1e9:.2f} GB", "")
        table.add_row("peak memory", f"{measured.peak / 1e9:.2f} GB", "")
    return table


def _row(spread: Spread, unit: str, digits: int) -> tuple[str, str]:
    extremes = f"{spread.least:.{digits}f} to {spread.most:.{digits}f}"
    return f"{spread.median:.{digits}f} {unit}", extremes
