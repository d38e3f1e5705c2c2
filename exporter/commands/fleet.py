"""`llama-onnx fleet FILE`: make many packages from one list."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.keys import given_password
from llama_onnx.runtime.commands.options import ray_option
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.signature import read_signer

if TYPE_CHECKING:
    from llama_onnx.exporter.fleet.fleet_task import Fleet
    from llama_onnx.exporter.fleet.run import Summary, Workers


@click.command("fleet")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    help="Tasks to run at once, as many as the predicted memory allows.  [default: 1]",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of each task.  [default: all processors shared by --jobs; with --ray 1]",
)
@ray_option
@click.option(
    "--retries",
    type=click.IntRange(0, 100),
    default=2,
    show_default=True,
    help="How often to retry a task whose process crashed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    file: Path,
    jobs: int | None,
    threads: int | None,
    ray: str | None,
    retries: int,
    as_json: bool,
) -> None:
    """Make the packages listed in FILE: export, prove, certify, sign, bundle.

    FILE is TOML: `out`, a table [defaults], and a [[model]] for each source with its adapters,
    targets and precisions, and the options of `export`. What exists and was made from the same
    files with the same options by this version is left alone. Each task has a process of its own,
    and one that dies is tried again. OUT/fleet.html and OUT/fleet.json report on all. The exit
    status is 1 if any task failed.
    """
    from llama_onnx.exporter.fleet.fleet_file import read_fleet
    from llama_onnx.exporter.fleet.fleet_page import write_report
    from llama_onnx.exporter.fleet.run import fleet_folder, run_fleet

    if ray is not None and jobs is not None:
        raise UsageError("--jobs is for this machine: with --ray, the cluster decides.")
    fleet = read_fleet(file)
    _check_keys(fleet)
    with ExitStack() as stack:
        stack.enter_context(fleet_folder(fleet))
        workers = _workers(stack, fleet, jobs, threads, ray)
        progress = stack.enter_context(progress_line())
        try:
            summary = run_fleet(fleet, workers, retries=retries, progress=progress)
        except KeyboardInterrupt:
            raise click.ClickException(
                "interrupted: what is finished is kept, and the same command goes on from there."
            ) from None
        write_report(summary)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        _print(summary)
    if failed := summary.count("failed"):
        raise click.ClickException(f"{failed} of {len(summary.rows)} tasks failed.")


def _check_keys(fleet: Fleet) -> None:
    """Raise `UsageError` for a key that cannot sign, before hours of exports.

    Tasks have no terminal, so that passwords can only come from the environment.
    """
    for key in dict.fromkeys(Path(task.sign) for task in fleet.tasks if task.sign):
        read_signer(key, partial(given_password, key))


def _workers(
    stack: ExitStack, fleet: Fleet, jobs: int | None, threads: int | None, ray: str | None
) -> Workers:
    if ray is not None:
        from llama_onnx.exporter.fleet.ray_workers import ray_workers

        return stack.enter_context(ray_workers(ray, fleet, threads))
    from llama_onnx.exporter.fleet.local_workers import LocalWorkers
    from llama_onnx.exporter.fleet.run import default_threads

    count = jobs or 1
    return LocalWorkers(count, threads or default_threads(count))


def _print(summary: Summary) -> None:
    from llama_onnx.exporter.fleet.run import report_files

    for row in summary.rows:
        if row.state == "failed":
            say(f"{row.task.name}: failed: {row.reason}", err=True)
        elif row.state == "made":
            say(f"{row.task.name}: {', '.join(row.stages)} in {row.seconds:,.1f} s")
    counts = ", ".join(
        f"{summary.count(state)} {state}" for state in ("made", "unchanged", "failed")
    )
    say(f"{counts} in {summary.seconds:,.1f} s: {report_files(summary.fleet.out)[0]}")
