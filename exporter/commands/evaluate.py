"""`llama-onnx evaluate`: compare a package with its original over a corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.options import Source
from llama_onnx.runtime.commands.console import progress_line
from llama_onnx.runtime.commands.options import ray_option
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.errors import UsageError

if TYPE_CHECKING:
    from llama_onnx.exporter.evaluate.shards import Work
    from llama_onnx.runtime.measure.evaluated import Evaluated


@click.command("evaluate")
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--reference",
    type=Source,
    help="The checkpoint that PACKAGE was made from: a path, or OWNER/NAME on the hub. Required "
    "for --text; with --tasks it is scored too.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The corpus: a UTF-8 file of any size.",
)
@click.option(
    "--tasks",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Tasks of lm-eval: YAML files, and their data as JSON lines beside them.",
)
@click.option(
    "--task", "names", multiple=True, metavar="NAME", help="Run only this task of --tasks."
)
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens in each passage.",
)
@click.option("--certify", is_flag=True, help="Add the figures to PACKAGE's certificate.")
@ray_option
@click.option(
    "--workers", type=click.IntRange(1, 1024), help="Actors with --ray.  [default: all CPUs]"
)
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where finished shards of --text are kept.  [default: PACKAGE-evaluation.journal]",
)
@click.option("--force", is_flag=True, help="Start over.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def command(
    package: Path,
    reference: Path | HubId | None,
    text: Path | None,
    tasks: Path | None,
    names: tuple[str, ...],
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
    kept: if a run ends early, run the same command without --force to continue. Each figure has a
    95 % confidence interval over passages.

    With --tasks, lm-eval's own harness scores PACKAGE. Nothing in the folder is run: a task that
    names Python code or data elsewhere is refused.
    """
    from llama_onnx.exporter.checkpoints.download import local_copy
    from llama_onnx.exporter.evaluate.record import check_recordable, record
    from llama_onnx.exporter.evaluate.shards import JOURNAL_SUFFIX, Work, describe
    from llama_onnx.exporter.evaluate.tasks.scoring import describe_tasks, left_out, score_tasks
    from llama_onnx.runtime.measure.evaluated import KEY as EVALUATED
    from llama_onnx.runtime.measure.jsontext import dumps
    from llama_onnx.runtime.measure.task_scores import KEY as TASK_SCORES

    _check(reference, text, tasks, names)
    if text is None and (ray or journal or force):
        raise UsageError("--ray, --journal and --force are for --text: leave them out.")
    if workers and not ray:
        raise UsageError("--workers is for --ray: without it, one process measures.")
    opened = check_recordable(package) if certify else None
    source = None if reference is None else local_copy(reference).resolve()
    entries: dict[str, Any] = {}
    # Tasks come first: the text may take hours, but its finished shards are kept.
    if tasks is not None:
        with progress_line() as progress:
            scores = score_tasks(package, tasks, names, source, progress)
        entries[TASK_SCORES] = [task.to_json() for task in scores]
        _tell(describe_tasks(scores), as_json)
        for name in left_out(scores, source is not None):
            say(f"warning: the original is not scored on {name}, which asks for answers.", err=True)
    over_text: dict[str, Any] = {}
    if text is not None and source is not None:
        absolute = package.resolve()
        journal = journal or absolute.with_name(absolute.name + JOURNAL_SUFFIX)
        work = Work(absolute, source, text.resolve(), length)
        found = _over_corpus(work, journal, force, ray, workers)
        over_text = entries[EVALUATED] = found.to_json()
        _tell(describe(found), as_json)
    if opened is not None:
        record(opened, entries)
        _tell([f"recorded in the certificate of {package}."], as_json)
    if as_json:
        scored = {TASK_SCORES: entries[TASK_SCORES]} if tasks is not None else {}
        say(dumps({**over_text, **scored}))


def _tell(lines: Iterable[str], as_json: bool) -> None:
    for line in lines if not as_json else ():
        say(line)


def _check(
    reference: Path | HubId | None, text: Path | None, tasks: Path | None, names: tuple[str, ...]
) -> None:
    if names and tasks is None:
        raise UsageError("--task names a task of a folder: give --tasks too.")
    if text is None and tasks is None:
        raise UsageError("there is nothing to evaluate on: give --text, --tasks or both.")
    if text is not None and reference is None:
        raise UsageError("--text compares with the checkpoint: give --reference too.")


def _over_corpus(
    work: Work, journal: Path, force: bool, ray: str | None, workers: int | None
) -> Evaluated:
    from llama_onnx.exporter.evaluate.shards import Measure, evaluate, measure_here

    measure: Measure = measure_here
    if ray is not None:
        from llama_onnx.exporter.evaluate.on_ray import measure_on

        measure = measure_on(ray, workers)
    with progress_line() as progress:
        return evaluate(work, journal, measure=measure, force=force, progress=progress)
