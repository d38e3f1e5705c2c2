"""`llama-onnx bench`: measure how fast a package is on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from llama_onnx.targets.engines import ENGINES
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

if TYPE_CHECKING:
    from rich.table import Table

    from llama_onnx.runtime.bench.bench import Bench
    from llama_onnx.targets.engines import EngineName
    from llama_onnx.targets.provider import Provider


def _numbers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise UsageError(
            f"--streams takes whole numbers with commas between them, such as 1,2,4, not "
            f"{shown(value)}."
        ) from None


def _report_file(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Check it before anything is measured."""
    if value is None:
        return None
    from llama_onnx.runtime.reports.report_file import check_report_file

    if value.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{value} must end in .html: the report is a page for a browser.")
    check_report_file(value)
    return value


@click.command("bench")
@package_argument
@click.option("--prompt-tokens", type=int, help="Tokens in the prompt.  [default: 512]")
@click.option("--new-tokens", type=int, help="Tokens to generate.  [default: 64]")
@click.option("--repeats", type=int, default=5, show_default=True, help="Runs to measure.")
@click.option(
    "--streams",
    callback=_numbers,
    metavar="LIST",
    help="Numbers of answers to generate at once, without --engine genai.  [default: 1,2,4,8]",
)
@click.option("--turns", type=int, help="Turns of a chat.  [default: 10]")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="PACKAGE",
    help="Measure this package in turns with the first, and say which is faster.",
)
@click.option(
    "--against-engine",
    type=click.Choice(ENGINES),
    help="The engine of the package after --against.  [default: that of --engine]",
)
@engine_option
@threads_option
@provider_options
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    callback=_report_file,
    metavar="FILE.html",
    help="Write tables and plots as an HTML page.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all measurements as JSON.")
def command(
    package: Path,
    prompt_tokens: int | None,
    new_tokens: int | None,
    repeats: int,
    streams: tuple[int, ...] | None,
    turns: int | None,
    against: Path | None,
    against_engine: EngineName | None,
    engine: EngineName | None,
    threads: int | None,
    provider: Provider | None,
    allow_fallback: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Measure PACKAGE on this machine: speed, time to the first token, memory.

    Prints the medians of several runs, in the engine that `generate` uses too, after one warm-up
    run: one answer alone, several at once unless genai generates, and the turns of a chat.
    """
    from llama_onnx.runtime.bench.bench import bench

    if against is None and against_engine is not None:
        raise UsageError("--against-engine needs --against PACKAGE, which may be the same package.")
    with progress_line() as progress:
        measured = bench(
            package,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            streams=streams,
            turns=turns,
            threads=threads,
            provider=provider,
            allow_fallback=allow_fallback,
            engine=engine,
            against=against,
            against_engine=against_engine,
            progress=progress,
        )
    if report is not None:
        from llama_onnx.runtime.bench.bench_page import write_report

        write_report(measured, report)
    if as_json:
        click.echo(json.dumps(measured.to_json()))
    else:
        _print(measured)


def _print(measured: Bench) -> None:
    from llama_onnx.runtime.bench.bench_table import remarks
    from llama_onnx.runtime.commands.tables import make_console

    for one, name in zip(_packages(measured), measured.names, strict=True):
        say(
            f"{name} · {one.precision} · "
            f"{one.provider['onnxruntime']} · prompt {one.prompt_tokens}, "
            f"answer {one.new_tokens} tokens"
        )
        if one.provider["fallback"]:
            say(f"{one.provider['fallback']} The CPU ran it instead.")
        if one.provider.get("tuned"):
            say(one.provider["tuned"])
    console = make_console()
    console.print(_table(measured))
    for line in (*(one.sentence for one in measured.comparison), *remarks(measured)):
        console.print(line)


def _packages(measured: Bench) -> Iterator[Bench]:
    yield measured
    if measured.against is not None:
        yield measured.against


def _table(measured: Bench) -> Table:
    from rich import box
    from rich.table import Column, Table

    from llama_onnx.runtime.bench.bench_table import rows

    runs = f"{measured.repeats} runs" if measured.repeats > 1 else "one run"
    names: tuple[str, ...] = ("median",)
    extent = "range"
    if measured.against is not None:
        names, extent = measured.names, "speed of second"
    columns = [Column(no_wrap=True)]
    columns += [Column(name, justify="right", overflow="fold") for name in (*names, extent)]
    engines = ", ".join(dict.fromkeys(one.engine for one in _packages(measured)))
    title = f"{runs}, engine {engines}"
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows(measured):
        table.add_row(row.name, *row.values, row.extent)
    return table
