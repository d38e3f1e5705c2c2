"""`llama-onnx plan SOURCE`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.describe import describe_weights
from llama_onnx.exporter.commands.options import (
    Source,
    adapter_option,
    explicit_options,
    export_options,
    gigabytes,
    headers_of,
    keep_option,
    sort_adapters,
)
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.registry import get_target

if TYPE_CHECKING:
    from rich.table import Table

    from llama_onnx.exporter.model.checkpoint import Checkpoint
    from llama_onnx.exporter.packaging.adapters import KeptAdapter
    from llama_onnx.exporter.packaging.budget import Decision
    from llama_onnx.exporter.packaging.plan import Plan


@click.command(name="plan")
@click.argument("source", type=Source)
@adapter_option
@keep_option
@export_options
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(
    source: Path | HubId,
    adapters: tuple[str, ...],
    keep_adapter: bool,
    target: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what exporting SOURCE would make and need.

    Reads the headers, and a few megabytes of weights to estimate the time. For a model on the hub
    (OWNER/NAME) with safetensors weights, only the headers are downloaded. With a budget, passes a
    text through the model first, forward and back, to see which matrices lose most.
    """
    from rich.table import Table
    from rich.text import Text

    from llama_onnx.exporter.packaging.adapters import open_kept
    from llama_onnx.exporter.packaging.deciding import make_decided_plan
    from llama_onnx.exporter.packaging.plan import estimate_seconds
    from llama_onnx.exporter.sources import open_checkpoint
    from llama_onnx.runtime.commands.tables import make_console

    merged, folders = sort_adapters(adapters, keep=keep_adapter)
    chosen = Options(**options)
    checkpoint = open_checkpoint(headers_of(source), merged, context=chosen.context)
    kept = open_kept(checkpoint, folders)
    workers = os.cpu_count() or 1
    given = explicit_options(options)
    with progress_line() as progress:
        plan = make_decided_plan(
            checkpoint,
            get_target(target),
            chosen,
            workers,
            kept,
            given,
            headers=isinstance(source, HubId),
            progress=progress,
        )
    seconds = estimate_seconds(plan, checkpoint)
    for warning in plan.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if plan.tokenizer is None:
        say(
            f"Warning: {source} has no tokenizer, so `export` refuses it: add the tokenizer to the "
            "checkpoint, or pass --no-tokenizer to `export` for a package that takes token ids "
            "only.",
            err=True,
        )
    if as_json:
        click.echo(json.dumps({**plan.to_json(), "estimated_seconds": round(seconds, 1)}))
        return
    names = "".join(f" + {folder.name}" for folder in merged)
    table = Table(title=Text(f"{source}{names} for {target}"), show_header=False)
    for name, value in _rows(plan, checkpoint, kept, seconds):
        table.add_row(name, Text(value))
    make_console().print(table)
    if plan.decision:
        make_console().print(_decision_table(plan.decision))


def _rows(
    plan: Plan, checkpoint: Checkpoint, kept: Sequence[KeptAdapter], seconds: float
) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{plan.parameters / 1e6:,.1f} million"
    yield "source", f"{gigabytes(plan.source_bytes)} ({checkpoint.format})"
    if plan.quantized:
        yield "quantized", plan.quantized
    tied = checkpoint.config.tie_word_embeddings
    yield "weights", describe_weights(plan.recipe.to_json(), tied=tied)
    yield "package", f"{gigabytes(plan.data_bytes)}, {plan.bits_per_weight:.2f} bits per parameter"
    for adapter in kept:
        changes = ", ".join(adapter.kinds)
        yield f"adapter {adapter.name}", f"{gigabytes(adapter.nbytes)}, changes {changes}"
    yield "memory", f"about {gigabytes(plan.peak_memory)} at the peak of the export"
    yield "disk", f"{gigabytes(plan.to_json()['disk_bytes'])} of free space needed"
    if wanted := plan.calibration:
        text = wanted.text or "the text that llama-onnx ships"
        yield "quantizer", f"{wanted.quantizer}, calibrated on {wanted.tokens:,} tokens of {text}"
    yield "time", f"about {seconds:.0f} s on this machine, plus the time to write the package"
    cache = gigabytes(plan.max_length * plan.cache_per_token)
    kind, each = plan.recipe.cache_type, gigabytes(plan.cache_per_token)
    yield (
        "KV cache",
        f"{kind}, {each} per token, {cache} at the default max_length of {plan.max_length:,}",
    )


def _decision_table(decision: Decision) -> Table:
    """Return what each kind of matrix gets, and the loss and time that are predicted for it."""
    from rich.table import Table

    from llama_onnx.exporter.packaging.budget import summarize

    table = Table(
        title=f"What each kind of matrix gets: predicted KL divergence {decision.predicted_kl:.3g}",
        caption="Bits / block size x matrices. At 4 / 64: the KL if all had 4 bits in blocks of "
        "64. Time: of the CPU's kernels, in relation to that.",
    )
    table.add_column("matrices", no_wrap=True)
    for heading in ("storage", "bytes", "KL", "at 4 / 64", "time"):
        table.add_column(heading, justify="left" if heading == "storage" else "right")
    for kind in summarize(decision):
        table.add_row(
            kind.name,
            ", ".join(f"{bits} / {size} x {count}" for (bits, size), count in kind.storages),
            gigabytes(kind.nbytes),
            f"{kind.loss:.4f}",
            f"{kind.plain_loss:.4f}",
            f"{kind.time / kind.plain_time:.0%}",
        )
    return table
