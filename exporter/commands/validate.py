"""`llama-onnx validate`: prove a package against the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.options import Source, adapter_option
from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage, is_package

if TYPE_CHECKING:
    from rich.table import Table

    from llama_onnx.exporter.parity.bisect.search import Bisection
    from llama_onnx.exporter.parity.measure.validate import ParityReport


@click.command("validate")
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=Source,
    help="The checkpoint the package was made from, here or on the hub (OWNER/NAME).",
)
@adapter_option
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure on the beginning of this UTF-8 file instead of the built-in texts.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Greedy tokens after each prompt.",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Longest prompt.",
)
@click.option("--max-kl", type=float, help="Also fail above this mean KL (nats) to the original.")
@click.option(
    "--certify", is_flag=True, help="If all holds, write the certificate that `verify` replays."
)
@click.option(
    "--thorough",
    is_flag=True,
    help="Also go past positions 2047, 2048 and 2049 and to the end of the context.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write the report as a page that needs nothing but a browser.",
)
@click.option(
    "--bisect",
    "bisecting",
    is_flag=True,
    help="If a threshold is missed, find the first layer and operator at fault.",
)
@click.option(
    "--bisect-out",
    type=click.Path(path_type=Path),
    help="Folder for that operator alone, its input and a script; PACKAGE-bisect unless given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    package: Path,
    reference: Path | HubId,
    adapters: tuple[str, ...],
    text: Path | None,
    tokens: int,
    prompt_tokens: int,
    max_kl: float | None,
    certify: bool,
    thorough: bool,
    report_file: Path | None,
    bisecting: bool,
    bisect_out: Path | None,
    as_json: bool,
) -> None:
    """Compare PACKAGE with the checkpoint it was made from, each kind of error by itself.

    With --adapter, either as merged into PACKAGE or, if PACKAGE keeps its adapters beside the base,
    with that one active.

    Exit status 1 when a threshold is missed.
    """
    from llama_onnx.exporter.checkpoints.download import local_copy
    from llama_onnx.exporter.parity.bisect.reproduce import check_out
    from llama_onnx.exporter.parity.bisect.search import bisect
    from llama_onnx.exporter.parity.measure.prompts import TEXTS, read_text
    from llama_onnx.exporter.parity.prove import prove
    from llama_onnx.exporter.parity.report.page import check_place, write_report
    from llama_onnx.exporter.sources import open_checkpoint

    if report_file:
        check_place(report_file)
    out = bisect_out or package.absolute().with_name(f"{package.absolute().name}-bisect")
    wanted = bisecting or bisect_out is not None
    if wanted:
        check_out(out, package)
    swapped = _swapped(package, adapters)
    if swapped and wanted:
        raise UsageError("--bisect looks at the bare base: give it without --adapter.")
    opened = ModelPackage.unchecked(package)
    if text and opened:
        opened.require_tokenizer()
    merged = [] if swapped else [Path(folder) for folder in adapters]
    original = open_checkpoint(local_copy(reference), merged)
    with progress_line() as progress:
        report = prove(
            package,
            original,
            texts=TEXTS if text is None else (read_text(text),),
            tokens=tokens,
            longest=prompt_tokens,
            swapped=swapped,
            max_kl=max_kl,
            thorough=thorough,
            certify=certify,
            progress=progress,
        )
        found = bisect(package, original, report, out, progress) if wanted else None
    if report_file:
        write_report(report, report_file)
    if as_json:
        click.echo(report.to_json(**({"bisect": found.to_json()} if found else {})))
    else:
        print_report(report)
        if found:
            _print_bisection(found)
        if certify and report.passed:
            click.echo(f"certified: {package / 'parity'}, for `llama-onnx verify`.")
    ctx.exit(0 if report.passed else 1)


def _swapped(package: Path, adapters: Sequence[str]) -> tuple[str, Path] | None:
    """Name and PEFT folder of the adapter to activate, if `package` has any beside its base."""
    from llama_onnx.exporter.packaging.adapters import named_adapters

    if not adapters or not is_package(package) or not ModelPackage.open(package).adapters:
        return None
    if len(adapters) > 1:
        raise UsageError(
            f"{package} keeps its adapters beside the base, and one is active at a time: give one "
            "--adapter."
        )
    (found,) = named_adapters(adapters).items()
    return found


def print_report(report: ParityReport) -> None:
    """Print what was measured, and the verdict last."""
    from rich.console import Console

    from llama_onnx.exporter.parity.report.words import (
        greedy,
        long_context,
        tokenizer,
        verdict,
        weights,
    )

    console = Console(highlight=False)
    for line in (
        f"package    {report.package} ({report.precision}, {report.activations} activations)",
        f"reference  {report.reference}",
        f"ran on     {report.provider}, {report.positions} positions",
        f"tokenizer  {tokenizer(report.tokenizer)}",
        f"weights    {weights(report.weights)}",
    ):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_situations(report))
    console.print(_losses(report))
    long = long_context(report.long, report.trained_length) if report.long else ()
    for line in chain(long, *map(greedy, report.greedy)):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_checks(report))
    outcome, _, reasons = verdict(report).partition(":")
    colour = "green" if report.passed else "red"
    console.print(f"[bold {colour}]{outcome}[/]:{reasons}", soft_wrap=True)


def _situations(report: ParityReport) -> Table:
    """The package's own weights are the reference: what is wrong here is no matter of precision."""
    from llama_onnx.runtime.measure.situations import LONG_CONTEXT, SITUATIONS

    figures = {(m.error, m.situation): m.figures for m in report.measurements}
    table = _table("PyTorch on the package's own weights is the reference", "situation")
    for name in ("graph max", "rel L2", "shipped max", "rel L2", "mean KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for situation in (*SITUATIONS, LONG_CONTEXT):
        graph = figures.get(("graph", situation.name))
        shipped = figures.get(("shipped", situation.name))
        if shipped is None:
            continue
        table.add_row(
            situation.meaning,
            *(
                ("-", "-")
                if graph is None
                else (f"{graph.max_abs:.1e}", f"{graph.relative_l2:.1e}")
            ),
            f"{shipped.max_abs:.1e}",
            f"{shipped.relative_l2:.1e}",
            f"{shipped.mean_kl:.1e}",
        )
    return table


def _losses(report: ParityReport) -> Table:
    from llama_onnx.exporter.parity.report.words import ratio

    figures = {(m.error, m.situation): m.figures for m in report.measurements}
    table = _table("the original weights are the reference", "what is lost")
    for name in ("mean KL", "p99 KL", "top-1", "top-5", "mean Δp", "ppl ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, key in (
        ("quantization", ("quantization", "")),
        ("all, one pass", ("total", "prefill")),
        ("all, token by token", ("total", "decode")),
    ):
        row = figures[key]
        table.add_row(
            label,
            f"{row.mean_kl:.1e}",
            f"{row.p99_kl:.1e}",
            f"{row.same_top1:.1%}",
            f"{row.top5_overlap:.1%}",
            "-" if row.mean_dp is None else f"{row.mean_dp:+.2%}",
            ratio(row.perplexity_ratio, row.perplexity_ratio_error),
        )
    return table


def _table(title: str, first: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, no_wrap=True)
    return table


def _checks(report: ParityReport) -> Table:
    """One row a limit, with the worst of what was held against it."""
    from llama_onnx.exporter.parity.report.words import worst

    table = _table("", "threshold")
    for name in ("worst", "limit", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in dict.fromkeys(check.threshold for check in report.checks):
        checks = [check for check in report.checks if check.threshold == row]
        passed = all(check.passed for check in checks)
        table.add_row(
            f"{row.measure} {row.metric}",
            f"{worst([check.value for check in checks]):.2g}",
            f"{row.limit:g}",
            "[green]ok[/]" if passed else "[bold red]MISSED[/]",
        )
    return table


def _print_bisection(bisection: Bisection) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    finding = bisection.finding
    if finding is None:
        console.print(f"bisect: {bisection.note}", markup=False, soft_wrap=True)
        return
    figures = f"relative L2 {finding.relative_l2:.2g}, largest difference {finding.max_abs:.2g}"
    rows = {
        "at fault": finding.sentence(),
        "or before it": ", ".join(finding.others),
        "cause": finding.cause + (f", {finding.situation}" if finding.situation else ""),
        "value": finding.value,
        "off by": figures,
        "where": "; ".join(finding.where),
        "alone": f"python {Path(finding.reproduction) / 'reproduce.py'}",
    }
    console.print("[bold]bisect[/]")
    for name, text in rows.items():
        if text:
            console.print(f"  {name:<13}{text}", markup=False, soft_wrap=True)
