"""`llama-onnx validate`: prove a package against the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from llama_onnx.exporter.parity.metrics import Divergence
    from llama_onnx.exporter.parity.validate import Greedy, ParityReport, Progress


@click.command("validate")
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="The checkpoint the package was made from.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure on the beginning of this UTF-8 file instead of the built-in texts.",
)
@click.option("--tokens", default=64, show_default=True, help="Greedy tokens after each prompt.")
@click.option("--prompt-tokens", default=128, show_default=True, help="Longest prompt.")
@click.option("--max-kl", type=float, help="Also fail above this mean KL (nats) to the original.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    package: Path,
    reference: Path,
    text: Path | None,
    tokens: int,
    prompt_tokens: int,
    max_kl: float | None,
    as_json: bool,
) -> None:
    """Compare PACKAGE with the checkpoint it was made from, each kind of error by itself.

    Exit status 1 when a threshold is missed.
    """
    from llama_onnx.exporter.checkpoints import check_tensors, open_checkpoint
    from llama_onnx.exporter.checkpoints.package import PackageCheckpoint
    from llama_onnx.exporter.parity.prompts import TEXTS, make_prompts, read_text
    from llama_onnx.exporter.parity.validate import check_same_model, validate

    weights, original = PackageCheckpoint.open(package), open_checkpoint(reference)
    check_same_model(weights, original)
    check_tensors(original)
    texts = TEXTS if text is None else (read_text(text),)
    prompts = make_prompts(package, weights.config, texts, tokens=tokens, longest=prompt_tokens)
    with _progress() as progress:
        report = validate(
            package, original, prompts, tokens=tokens, max_kl=max_kl, progress=progress
        )
    if as_json:
        click.echo(report.to_json())
    else:
        _print(report)
    ctx.exit(0 if report.passed else 1)


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A progress line on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Bars(console=console, transient=True) as bars:
        task = bars.add_task("starting", total=None)
        yield lambda what, done, total: bars.update(
            task, description=what, completed=done, total=total
        )


def _print(report: ParityReport) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.print(f"package    {report.package} ({report.precision})", markup=False)
    console.print(f"reference  {report.reference}", markup=False)
    console.print(f"ran on     {report.provider}, {report.positions} positions", markup=False)
    console.print(_measurements(report))
    for greedy in report.greedy:
        _print_greedy(console, greedy)
    console.print(_checks(report))
    missed = [c.threshold for c in report.checks if not c.passed]
    if not missed:
        console.print("[bold green]passed[/]: every threshold holds.")
        return
    names = ", ".join(f"{row.measure} {row.metric}" for row in missed)
    console.print(f"[bold red]failed[/]: {names} beyond the limit.")


def _measurements(report: ParityReport) -> Table:
    from rich.table import Table

    table = Table("error", title="Logits, and divergence in nats", title_justify="left")
    for name in ("max abs", "rel L2", "mean KL", "p99 KL", "top-1", "ppl"):
        table.add_column(name, justify="right")
    for measurement in report.measurements:
        figures = measurement.figures
        ratio = figures.perplexity_ratio
        table.add_row(
            measurement.title,
            f"{figures.max_abs:.1e}",
            f"{figures.relative_l2:.1e}",
            f"{figures.mean_kl:.1e}",
            f"{figures.p99_kl:.1e}",
            f"{figures.same_top1:.1%}",
            "-" if ratio is None else f"x{ratio:.4f}",
        )
    return table


def _checks(report: ParityReport) -> Table:
    from rich.table import Table

    table = Table("threshold", "measured", "limit", "", title="Thresholds", title_justify="left")
    for check in report.checks:
        row = check.threshold
        table.add_row(
            f"{row.measure} {row.metric}",
            f"{check.value:.2g}",
            f"{row.limit:g}",
            "[green]ok[/]" if check.passed else "[bold red]MISSED[/]",
        )
    return table


def _print_greedy(console: Console, greedy: Greedy) -> None:
    console.print(
        f"greedy, {greedy.title}: {greedy.identical} of {len(greedy.divergences)} continuations "
        f"of {greedy.tokens} tokens identical, {greedy.agreement:.1%} of tokens",
        markup=False,
    )
    for index, divergence in enumerate(greedy.divergences):
        if divergence is not None:
            console.print(f"  prompt {index + 1}: {_describe(divergence)}", markup=False)


def _describe(divergence: Divergence) -> str:
    from llama_onnx.exporter.parity.validate import NEAR_TIE

    tie = " - a near-tie" if divergence.margin <= NEAR_TIE else ""
    return (
        f"token {divergence.step + 1} is {divergence.chosen}, the reference has "
        f"{divergence.expected} ahead by {divergence.margin:.2g}{tie}"
    )
