"""`llama-onnx doctor`: check what this machine can run, and how to fix what it cannot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.targets.package import ModelPackage

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llama_onnx.runtime.doctor.finding import Finding

_STYLES = {"ok": "green", "warning": "yellow", "trouble": "bold red"}


@click.command("doctor")
@click.argument("package", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print findings and facts as JSON.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time limit for onnxruntime and for each provider.",
)
@click.pass_context
def command(ctx: click.Context, package: Path | None, as_json: bool, timeout: float) -> None:
    """Check what this machine can run, and say how to fix what it cannot.

    Each provider of the installed onnxruntime opens and runs a small int4 Llama in a separate
    process. With PACKAGE, also says whether that package is tuned here.
    Exits with 1 if anything does not work, with 0 if there are only warnings.
    """
    from llama_onnx.runtime.doctor.examine import examine
    from llama_onnx.runtime.doctor.finding import worst
    from llama_onnx.runtime.doctor.gather import gather

    opened = None if package is None else ModelPackage.open(package)
    with progress_line() as progress:
        facts = gather(seconds=timeout, progress=progress)
    findings = tuple(examine(facts))
    if opened is not None:
        from llama_onnx.runtime.tuning.judge_tuning import judge_tuning

        findings = (*findings, judge_tuning(opened))
    status = worst(findings)
    if as_json:
        content: dict[str, Any] = {"status": status, "findings": [asdict(f) for f in findings]}
        click.echo(json.dumps({**content, "facts": asdict(facts)}, indent=2))
    else:
        _print(findings)
    ctx.exit(1 if status == "trouble" else 0)


def _print(findings: Sequence[Finding]) -> None:
    from llama_onnx.runtime.commands.tables import make_console

    console = make_console()
    console.print(_table(findings))
    _print_remedies(console, [finding for finding in findings if finding.mend])
    troubles, warnings = (
        sum(finding.status == status for finding in findings) for status in ("trouble", "warning")
    )
    if troubles or warnings:
        click.echo(f"{_count(troubles, 'problem')}, {_count(warnings, 'warning')}.")
    else:
        click.echo("Nothing to fix.")


def _table(findings: Sequence[Finding]) -> Table:
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    columns = Column(no_wrap=True), Column(no_wrap=True), Column(overflow="fold")
    table = Table(*columns, box=box.SIMPLE, show_header=False, show_edge=False, pad_edge=False)
    for finding in findings:
        status = Text(finding.status, style=_STYLES[finding.status])
        table.add_row(status, finding.name, Text(finding.found))
    return table


def _print_remedies(console: Console, findings: Sequence[Finding]) -> None:
    """Print each remedy on one long line, so that its command can be copied."""
    from rich.text import Text

    from llama_onnx.runtime.doctor.finding import worst

    for mend in dict.fromkeys(finding.mend for finding in findings):
        same = [finding for finding in findings if finding.mend == mend]
        names, style = ", ".join(finding.name for finding in same), _STYLES[worst(same)]
        console.print(Text.assemble("\n", (names, style), f": {mend}."), soft_wrap=True)
    click.echo()


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
