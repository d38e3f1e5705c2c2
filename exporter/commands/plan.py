"""`llama-onnx plan SOURCE`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.options import (
    Source,
    adapter_option,
    explicit_options,
    export_options,
    gigabytes,
    headers_of,
    keep_option,
    make_options,
    sort_adapters,
)
from llama_onnx.targets.registry import get_target


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
    """Say what exporting SOURCE would make and need.

    Reads headers, and a few megabytes of weights to estimate the time. Of a model on the
    hub (OWNER/NAME) only the headers are downloaded, if its weights are safetensors.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llama_onnx.exporter.packaging.adapters import open_kept
    from llama_onnx.exporter.packaging.plan import estimate_seconds, make_plan
    from llama_onnx.exporter.sources import open_checkpoint

    merged, folders = sort_adapters(adapters, keep=keep_adapter)
    checkpoint = open_checkpoint(headers_of(source), merged)
    kept = open_kept(checkpoint, folders)
    workers = os.cpu_count() or 1
    given = explicit_options(options)
    plan = make_plan(checkpoint, get_target(target), make_options(**options), workers, kept, given)
    seconds = estimate_seconds(plan, checkpoint)
    if as_json:
        click.echo(json.dumps({**plan.to_json(), "estimated_seconds": round(seconds, 1)}))
        return
    recipe = plan.recipe
    names = "".join(f" + {folder.name}" for folder in merged)
    table = Table(title=Text(f"{source}{names} for {target}"), show_header=False)
    for name, value in (
        ("parameters", f"{plan.parameters / 1e6:,.1f} M"),
        ("source", f"{gigabytes(plan.source_bytes)} ({checkpoint.format})"),
        *([("quantized", plan.quantized)] if plan.quantized else []),
        ("linear layers", _linear(recipe)),
        ("embedding, head", f"{_storage(recipe.embedding)}, {_storage(recipe.head)}"),
        ("package", f"{gigabytes(plan.data_bytes)}, {plan.bits_per_weight:.2f} bits a weight"),
        *((f"adapter {a.name}", f"{gigabytes(a.nbytes)}, {', '.join(a.kinds)}") for a in kept),
        ("peak memory", f"about {gigabytes(plan.peak_memory)}"),
        ("disk", f"{gigabytes(plan.to_json()['disk_bytes'])} free needed"),
        ("time", f"about {seconds:.0f} s here, and the disk's own time for the package"),
        ("KV cache", f"{gigabytes(plan.cache_per_token)} a token"),
        (
            "max_length",
            f"{plan.max_length} by default, a cache of "
            f"{gigabytes(plan.max_length * plan.cache_per_token)}",
        ),
    ):
        table.add_row(name, value)
    Console().print(table)


def _linear(recipe: Any) -> str:
    taken = recipe.to_json()["taken_over"]
    ways = [f"int{way['bits']}, blocks of {way['block_size']}" for way in taken]
    return " and ".join(dict.fromkeys(ways)) or _storage(recipe.linear)


def _storage(storage: Any) -> str:
    block = getattr(storage, "block_size", None)
    return storage.name if block is None else f"{storage.name}, blocks of {block}"
