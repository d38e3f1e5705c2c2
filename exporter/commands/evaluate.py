"""`llama-onnx evaluate`: compare a package with its original over a corpus."""

from __future__ import annotations

from pathlib import Path

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.options import Source
from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.streams import say


@click.command("evaluate")
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--reference",
    required=True,
    type=Source,
    help="The checkpoint that PACKAGE was made from: a path, or OWNER/NAME on the hub.",
)
@click.option(
    "--text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The corpus: a UTF-8 file of any size.",
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens of a passage, which is read by itself.",
)
@click.option("--certify", is_flag=True, help="Add the figures to PACKAGE's certificate.")
@click.option("--ray", metavar="ADDRESS", help="Use the Ray cluster at this address, or auto.")
@click.option(
    "--workers", type=click.IntRange(1, 1024), help="Actors with --ray.  [default: all CPUs]"
)
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where finished shards are kept.  [default: PACKAGE-evaluation.journal]",
)
@click.option("--force", is_flag=True, help="Start over.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    package: Path,
    reference: Path | HubId,
    text: Path,
    length: int,
    certify: bool,
    ray: str | None,
    workers: int | None,
    journal: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare PACKAGE with its checkpoint over a corpus: KL, likeliest tokens, perplexity.

    The corpus is cut into shards, which are measured apart and add up exactly. Finished shards are
    kept: if a run ends early, the same command goes on from there. Each figure has a 95 %
    confidence interval over passages.
    """
    from llama_onnx.exporter.checkpoints.download import local_copy
    from llama_onnx.exporter.evaluate.record import check_recordable, record
    from llama_onnx.exporter.evaluate.shards import (
        JOURNAL_SUFFIX,
        Measure,
        Work,
        describe,
        evaluate,
        measure_here,
    )
    from llama_onnx.runtime.measure.jsontext import dumps

    opened = check_recordable(package) if certify else None
    absolute = package.resolve()
    work = Work(absolute, local_copy(reference).resolve(), text.resolve(), length)
    journal = journal or absolute.with_name(absolute.name + JOURNAL_SUFFIX)
    measure: Measure = measure_here
    if ray is not None:
        from llama_onnx.exporter.evaluate.on_ray import measure_on

        measure = measure_on(ray, workers)
    with progress_line() as progress:
        found = evaluate(work, journal, measure=measure, force=force, progress=progress)
    if opened is not None:
        record(opened, found)
    if as_json:
        say(dumps(found.to_json()))
        return
    for line in describe(found):
        say(line)
    if opened is not None:
        say(f"recorded in the certificate of {package}.")
