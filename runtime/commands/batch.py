"""`llama-onnx batch`: answer a file of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_onnx.runtime.commands.console import note, progress_line
from llama_onnx.runtime.commands.options import (
    package_argument,
    provider_options,
    ray_option,
    threads_option,
)
from llama_onnx.runtime.commands.size_option import size_option
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.extras import missing_extra

if TYPE_CHECKING:
    from llama_onnx.targets.provider import Provider


@click.command("batch")
@package_argument
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--name", help="The model's name in the requests.  [default: the package's folder]")
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    help="Processes, or with --ray actors.  [default: one for each processor, or with --ray as "
    "many as fit]",
)
@click.option(
    "--rows",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Answers to generate at once in each worker.",
)
@click.option("--max-length", type=int, help="Limit the context to fewer tokens.")
@size_option(
    "--cache-memory",
    help="Memory for keys and values of all workers of a machine: 500MB, 2GB.  "
    "[default: half of what is free]",
)
@ray_option
@click.option("--force", is_flag=True, help="Replace OUT, and start over.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@threads_option
@provider_options
def command(
    package: Path,
    source: Path,
    out: Path,
    name: str | None,
    workers: int | None,
    rows: int,
    max_length: int | None,
    cache_memory: int | None,
    ray: str | None,
    force: bool,
    as_json: bool,
    threads: int | None,
    provider: Provider | None,
    allow_fallback: bool,
) -> None:
    """Answer the requests in IN, one on each line, and write the answers to OUT in that order.

    A line is a request of OpenAI's batch format, or plain: {"prompt": ...} or {"messages": ...}
    with sampling fields beside it. A .parquet file has a request in each row. A line that cannot be
    answered gets an error in OUT.

    Finished lines are kept in OUT.journal. If a run ends early, whatever the reason, run the same
    command without --force to continue.
    """
    try:
        from llama_onnx.runtime.batch import batch
        from llama_onnx.runtime.batch.worker import Opening
    except ModuleNotFoundError as error:
        raise missing_extra("llama-onnx batch", error.name, "cpu,batch") from None

    opened, sha256 = batch.open_package(package)
    opening = Opening(
        str(package.resolve()),
        sha256,
        name or package.resolve().name,
        rows,
        max_length=max_length,
        provider=provider,
        allow_fallback=allow_fallback,
    )
    if ray is None:
        if tuned := batch.describe_tuning(opened, provider):
            note(tuned)
        plan = batch.plan_workers(workers, threads, opened)
        start = batch.local_start(plan, cache_memory, opened)
    else:
        from llama_onnx.runtime.batch.ray_cluster import ray_start

        start = ray_start(ray, workers, threads, cache_memory)
    with progress_line() as progress:
        summary = batch.run_batch(opening, source, out, start, force=force, progress=progress)
    if as_json:
        say(json.dumps(summary.to_json(), indent=2))
        return
    for text in batch.describe(summary, out):
        note(text)
