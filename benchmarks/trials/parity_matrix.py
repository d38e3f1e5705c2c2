"""`nox -s parity`: storage x source x architecture x provider, on tiny models, in one table.

python -m benchmarks.trials.parity_matrix [--real] [--all] [--json] [--workers N] [-k TEXT]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.support.matrix import SOURCES, STORAGES, VARIANTS, Case, Made, all_cases, cover

REAL = "SmolLM2-135M, GGUF Q4_1"


@dataclass(frozen=True)
class Row:
    """One case: `graph` is the largest relative L2 of all situations, `kl` and `shipped_kl` are the
    mean KL in nats of the quantization and of int8 activations; `providers` maps each available
    one to whether it replayed the certificate; `problem` is why the case failed."""

    storage: str
    source: str
    variant: str
    graph: float | None = None
    kl: float | None = None
    shipped_kl: float | None = None
    identical: str = ""
    providers: dict[str, bool] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether every threshold held, on every provider."""
        return not self.problem


@click.command()
@click.option("--real", is_flag=True, help="The real SmolLM2-135M in every storage instead.")
@click.option("--all", "every", is_flag=True, help="Every combination, not only a cover of pairs.")
@click.option("-k", "only", default="", help="Only cases with this text in a name.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def main(real: bool, every: bool, only: str, workers: int, as_json: bool) -> None:
    """Export, validate and replay each case; exit status 1 when one fails."""
    cases = choose(real=real, every=every, only=only)
    available, absent = find_providers()
    started, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="llama-onnx ä 日本 ") as folder:
        places = [Path(folder, str(number)) for number in range(len(cases))]
        arguments = (cases, places, [tuple(available)] * len(cases), [real] * len(cases))
        # Fresh processes: a forked one would inherit threads of torch in any state.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for row in pool.map(run_case, *arguments):
                rows.append(row)
                _tick(len(rows), len(cases), row)
    passed, seconds = all(row.passed for row in rows), time.perf_counter() - started
    content = {
        "passed": passed,
        "seconds": seconds,
        "absent_providers": absent,
        "rows": [{**asdict(row), "passed": row.passed} for row in rows],
    }
    if as_json:
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print(rows, tuple(available), absent, seconds, every=every or real)
    sys.exit(0 if passed else 1)


def choose(*, real: bool, every: bool, only: str) -> list[Case]:
    """Return the cases to run; raise click's usage error if there are none."""
    everything = list(all_cases())
    chosen = everything if every else cover(everything)
    if real:
        chosen = [Case(storage, REAL, "GQA, tied") for storage in STORAGES]
    found = [c for c in chosen if only.lower() in f"{c.storage} {c.source} {c.variant}".lower()]
    if not found:
        raise click.UsageError(f"no case has {only!r} in its name.")
    return found


def find_providers() -> tuple[list[str], dict[str, str]]:
    """Return the names of the providers that run here, and why the others do not."""
    from llama_onnx.runtime.placement.availability import require
    from llama_onnx.targets.errors import ProviderError
    from llama_onnx.targets.providers import PROVIDERS

    available, absent = [], {}
    for name, provider in PROVIDERS.items():
        try:
            require(provider)
            available.append(name)
        except ProviderError as error:
            absent[name] = str(error)
    return available, absent


def run_case(case: Case, folder: Path, providers: Sequence[str], real: bool) -> Row:
    """Make the source, export it, validate it, and replay its certificate on each provider."""
    import torch

    if not real:
        torch.set_num_threads(1)  # several threads slow down models this small
    started = time.perf_counter()
    try:
        row = _measure(case, folder, providers, real)
    except Exception as error:  # the other cases must still run
        row = Row(**asdict(case), problem=f"{type(error).__name__}: {error}")
    return Row(**{**asdict(row), "seconds": time.perf_counter() - started})


def _measure(case: Case, folder: Path, providers: Sequence[str], real: bool) -> Row:
    from llama_onnx.exporter.packaging.export import export_package
    from llama_onnx.exporter.parity.prove import prove
    from llama_onnx.exporter.parity.report.words import failure
    from llama_onnx.exporter.sources import open_checkpoint
    from llama_onnx.runtime.measure.verify import verify
    from llama_onnx.targets.cpu import TARGET
    from llama_onnx.targets.providers import PROVIDERS

    made = (
        _real() if real else SOURCES[case.source].write(folder / "source", VARIANTS[case.variant])
    )
    package = folder / "package"
    export_package(made.path, package, TARGET, STORAGES[case.storage], adapters=made.adapters)
    report = prove(
        package,
        open_checkpoint(made.path, made.adapters),
        tokens=16 if real else 8,
        longest=128 if real else 48,
        thorough=case.thorough,
        accept_loss=True,  # the matrix is about conversion: `--real` has int4 rounded to nearest
        certify=True,
    )
    problems = [] if report.passed else ["; ".join(failure(report))]
    replayed = {}
    for name in providers if report.passed else ():
        verified = verify(package, PROVIDERS[name])
        replayed[name] = verified.passed
        if not verified.passed:
            problems.append(f"verify on {name} fails")
    figures = {(m.error, m.situation): m.figures for m in report.measurements}
    graph = report.greedy[0]
    return Row(
        **asdict(case),
        graph=max(f.relative_l2 for (error, _), f in figures.items() if error == "graph"),
        kl=figures["quantization", ""].mean_kl,
        shipped_kl=max(f.mean_kl for (error, _), f in figures.items() if error == "shipped"),
        identical=f"{graph.identical}/{len(graph.divergences)}",
        providers=replayed,
        problem="; ".join(problems),
    )


def _real() -> Made:
    from examples.demo import find_model

    return Made(find_model())


def _tick(done: int, total: int, row: Row) -> None:
    outcome = "ok" if row.passed else "FAILED"
    name = f"{row.storage} | {row.source} | {row.variant}"
    click.echo(f"[{done}/{total}] {outcome} {name} ({row.seconds:.1f} s)", err=True)


def _print(
    rows: Sequence[Row],
    providers: Sequence[str],
    absent: dict[str, str],
    seconds: float,
    *,
    every: bool,
) -> None:
    console = Console(highlight=False)
    console.width = max(console.width, 125)  # narrower, the table is cut off
    table = Table(title=f"Parity of {len(rows)} packages", title_style="bold")
    for name in ("stored as", "source", "architecture"):
        table.add_column(name, no_wrap=True)
    for name in ("graph rel L2", "KL weights", "KL int8", "greedy", "runs on", "s", ""):
        table.add_column(name, justify="right", no_wrap=True)
    last = ""
    for row in rows:
        if last and row.storage != last:
            table.add_section()
        table.add_row(*_cells(row, last))
        last = row.storage
    console.print(table)
    for row in rows:
        if not row.passed:
            text = f"FAILED {row.storage} | {row.source} | {row.variant}: {row.problem}"
            console.print(text, markup=False, soft_wrap=True)
    for line in _notes(rows, providers, absent, seconds, every):
        console.print(line, markup=False, soft_wrap=True)


def _cells(row: Row, last: str) -> Iterator[str]:
    yield "" if row.storage == last else row.storage
    yield row.source
    yield row.variant
    for value in (row.graph, row.kl, row.shipped_kl):
        yield "-" if value is None else f"{value:.1e}"
    yield row.identical
    yield ", ".join(name if held else f"not {name}" for name, held in row.providers.items())
    yield f"{row.seconds:.1f}"
    yield "[green]ok[/]" if row.passed else "[bold red]FAILED[/]"


def _notes(
    rows: Sequence[Row],
    providers: Sequence[str],
    absent: dict[str, str],
    seconds: float,
    every: bool,
) -> Iterator[str]:
    failed = sum(not row.passed for row in rows)
    which = "every case asked for" if every else "every pair of values, not every combination"
    yield f"{len(rows) - failed} passed, {failed} failed in {seconds:.0f} s ({which})."
    yield f"Certificates replayed on: {', '.join(providers)}."
    for reason in absent.values():
        yield f"Not tried: {reason}"


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    main()
