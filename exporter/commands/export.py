"""`llama-onnx export SOURCE OUT`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.options import (
    Folder,
    Source,
    adapter_option,
    explicit_options,
    export_options,
    gigabytes,
    keep_option,
    sort_adapters,
)
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.registry import get_target

if TYPE_CHECKING:
    from llama_onnx.exporter.packaging.export import ExportResult
    from llama_onnx.exporter.parity.measure.report import ParityReport


@click.command(name="export")
@click.argument("source", type=Source)
@click.argument("out", type=Folder)
@adapter_option
@keep_option
@export_options
@click.option("--add", is_flag=True, hidden=True)
@click.option("--resume", is_flag=True, help="Continue an export that was interrupted.")
@click.option("--force", is_flag=True, help="Replace OUT, or an unfinished export of it.")
@click.option("--no-checksum", is_flag=True, help="Do not compare SOURCE with its checklist.chk.")
@click.option(
    "--hash-source",
    is_flag=True,
    help="Read SOURCE once more to record the sha256 of its files in the manifest.  [default: the "
    "hashes of the hub or checklist.chk]",
)
@click.option(
    "--no-tokenizer",
    is_flag=True,
    help="Leave the tokenizer out: OUT takes token ids only, and SOURCE needs no tokenizer.",
)
@click.option(
    "--prove",
    is_flag=True,
    help="Also validate the package against SOURCE, and write its certificate into it.",
)
@click.option(
    "--accept-loss",
    is_flag=True,
    help="With --prove: accept a loss beyond the limits of fidelity that the recipe has.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    source: Path | HubId,
    out: Path,
    adapters: tuple[str, ...],
    keep_adapter: bool,
    add: bool,
    target: str,
    resume: bool,
    force: bool,
    no_checksum: bool,
    hash_source: bool,
    no_tokenizer: bool,
    prove: bool,
    accept_loss: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export the checkpoint SOURCE to the package OUT.

    SOURCE is a Hugging Face folder, Meta's download, a .gguf file, or a model on the
    Hugging Face hub (OWNER/NAME or OWNER/NAME@REVISION), which is downloaded first.
    Memory use depends on the largest matrix, not on the number of layers.
    """
    from llama_onnx.exporter.packaging.export import export_package

    if accept_loss and not prove:
        raise UsageError("--accept-loss is about what --prove measures: pass --prove too.")
    if add:
        raise UsageError(f"export makes new packages: use {_adapter_add(source, out)}.")
    merged, kept = sort_adapters(adapters, keep=keep_adapter)
    with _resumable(), progress_line() as progress:
        result = export_package(
            source,
            out,
            get_target(target),
            Options(**options),
            adapters=merged,
            kept=kept,
            resume=resume,
            force=force,
            checksum=not no_checksum,
            hash_source=hash_source,
            tokenizer=not no_tokenizer,
            explicit=explicit_options(options),
            progress=progress,
        )
    for warning in result.warnings:
        say(f"Warning: {warning}", err=True)
    report = _prove(result.source, merged, out, accept_loss) if prove else None
    if as_json:
        proof = {"parity": json.loads(report.to_json())} if report else {}
        click.echo(json.dumps({**result.to_json(), **proof}))
    else:
        for line in _summary(result, out, target, list(kept), tokenizer=not no_tokenizer):
            say(line)
        if report:
            _print(report)
    if report:
        _refuse(report)


def _adapter_add(source: Path | HubId, out: Path) -> str:
    return f"`llama-onnx adapter add {out} NAME=DIR --base {source}`"


@contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise click.ClickException(
            "interrupted: repeat the command with --resume to continue."
        ) from None


def _summary(
    result: ExportResult, out: Path, target: str, kept: Sequence[str], *, tokenizer: bool
) -> Iterator[str]:
    plan = result.plan
    yield (
        f"{out}: {plan.recipe.precision} for {target}, {gigabytes(result.package_bytes)} "
        f"({plan.bits_per_weight:.2f} bits a weight) in {result.total_seconds:.1f} s; "
        f"{_tried(result)}."
    )
    if not tokenizer:
        yield "It has no tokenizer: it takes token ids only."
    if plan.structure:
        yield f"Not run on {plan.structure.provider} here: {plan.structure}."
    if plan.quantized:
        yield f"Source: {plan.quantized}."
    if kept:
        yield f"Adapters beside it: {', '.join(kept)} (`generate --adapter NAME`)."
    if result.resumed_bytes:
        yield f"Resumed: {gigabytes(result.resumed_bytes)} was already written."


def _tried(result: ExportResult) -> str:
    if result.exact:
        return (
            f"ran a step in fp32, because the CPU has no {result.plan.recipe.activations} kernels"
        )
    on_cpu = " on the CPU" if result.plan.structure else ""
    return f"opened and ran a step{on_cpu}"


def _prove(
    source: Path, adapters: Sequence[Path], package: Path, accept_loss: bool
) -> ParityReport:
    from llama_onnx.exporter.parity.prove import prove
    from llama_onnx.exporter.sources import open_checkpoint

    with progress_line() as progress:
        return prove(
            package,
            open_checkpoint(source, adapters),
            accept_loss=accept_loss,
            certify=True,
            progress=progress,
        )


def _print(report: ParityReport) -> None:
    from llama_onnx.exporter.parity.report.terminal import print_report

    print_report(report)


def _refuse(report: ParityReport) -> None:
    """Raise `ClickException` unless both verdicts allow a certificate."""
    without = "the package was written without a certificate, because it"
    if not report.passed:
        raise click.ClickException(f"{without} differs from SOURCE.")
    if report.fidelity and not report.accepted:
        raise click.ClickException(
            f"{without} loses more than its recipe may ({report.fidelity.grade}): export it with "
            "another, or pass --accept-loss."
        )
