"""Prints a parity report, and what bisect found, on the terminal."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llama_onnx.exporter.parity.bisect.search import Bisection
from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.report import words
from llama_onnx.runtime.commands.tables import make_console
from llama_onnx.runtime.measure.fidelity import Fidelity
from llama_onnx.runtime.measure.situations import LONG_CONTEXT, SITUATIONS


def print_report(report: ParityReport) -> None:
    """Print what was measured, with the two verdicts last."""
    console = make_console()
    for line in (
        f"package    {report.package} ({report.precision}, {report.activations} activations)",
        f"original   {report.original}",
        f"ran on     {report.provider}, {report.positions} positions",
        *([f"sampled    {sampled}"] if (sampled := words.sampled(report.sample)) else ()),
        f"tokenizer  {words.tokenizer(report.tokenizer)}",
        f"weights    {words.weights(report.weights)}",
    ):
        console.print(line, soft_wrap=True)
    console.print(_situations(report))
    console.print(_losses(report))
    long = words.long_context(report.long, report.trained_length) if report.long else ()
    for line in chain(long, *map(words.greedy, report.greedy)):
        console.print(line, soft_wrap=True)
    console.print(_verdicts(report))
    outcome, _, reasons = words.verdict(report).partition(":")
    _print_verdict(console, "conversion", outcome, "green" if report.passed else "red", reasons)
    found = report.fidelity
    grade, figures = words.fidelity(found)
    _print_verdict(console, "fidelity  ", grade, _color(found), f" {figures}.")
    for line in words.limits(found):
        console.print(f"           {line}.", soft_wrap=True)


def _print_verdict(console: Console, name: str, outcome: str, color: str, reasons: str) -> None:
    console.print(Text.assemble(f"{name} ", (outcome, f"bold {color}"), ":"), end="")
    console.print(reasons, soft_wrap=True)


def _color(found: Fidelity | None) -> str:
    if found is None or not found.trained:
        return "yellow"
    if found.missed:
        return "yellow" if found.allowed else "red"
    return "yellow" if found.grade in words.LOSES_MUCH else "green"


def print_bisection(bisection: Bisection) -> None:
    """Print the piece at fault, or why none was found."""
    console = make_console()
    finding = bisection.finding
    if finding is None:
        console.print(f"bisect: {bisection.note}", soft_wrap=True)
        return
    rows = {
        "at fault": finding.sentence(),
        "or before it": ", ".join(finding.others),
        "cause": finding.cause + (f", {finding.situation}" if finding.situation else ""),
        "value": finding.value,
        "error": f"relative L2 {finding.relative_l2:.2g}, largest {finding.max_abs:.2g}",
        "location": "; ".join(finding.where),
        "reproduce": f"python {Path(finding.reproduction) / 'reproduce.py'}",
    }
    console.print(Text("bisect", style="bold"))
    for name, text in rows.items():
        if text:
            console.print(f"  {name:<13}{text}", soft_wrap=True)


def _situations(report: ParityReport) -> Table:
    """Return the errors against the package's weights, which have nothing to do with precision."""
    graph, shipped = report.by_situation("graph"), report.by_situation("shipped")
    table = _table("against PyTorch on the package's weights", "situation")
    for name in ("graph max", "rel L2", "shipped max", "rel L2", "mean KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for situation in (*SITUATIONS, LONG_CONTEXT):
        if situation.name not in shipped:
            continue
        row, own = shipped[situation.name], graph.get(situation.name)
        table.add_row(
            situation.meaning,
            *(("-", "-") if own is None else (f"{own.max_abs:.1e}", f"{own.relative_l2:.1e}")),
            f"{row.max_abs:.1e}",
            f"{row.relative_l2:.1e}",
            f"{row.mean_kl:.1e}",
        )
    return table


def _losses(report: ParityReport) -> Table:
    table = _table("against PyTorch on the original weights", "what is lost")
    for name in ("mean KL", "p99 KL", "top-1", "top-5", "mean Δp", "ppl ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, error, situation in words.LOSSES:
        row = report.figures(error, situation)
        table.add_row(
            label,
            f"{row.mean_kl:.1e}",
            f"{row.p99_kl:.1e}",
            f"{row.same_top1:.1%}",
            f"{row.top5_overlap:.1%}",
            "-" if row.mean_dp is None else f"{row.mean_dp:+.2%}",
            words.ratio(row.perplexity_ratio, row.perplexity_ratio_error),
        )
    return table


def _verdicts(report: ParityReport) -> Table:
    table = _table("", "threshold")
    for name in ("worst", "limit", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for verdict in report.verdicts():
        table.add_row(
            verdict.name,
            f"{verdict.worst:.2g}",
            f"{verdict.limit:g}",
            Text("ok", "green") if verdict.passed else Text("MISSED", "bold red"),
        )
    return table


def _table(title: str, first: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, no_wrap=True)
    return table
