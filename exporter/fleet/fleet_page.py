"""All tasks of a fleet on one HTML page, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from llama_onnx.exporter.fleet.make_package import warnings_of
from llama_onnx.exporter.fleet.run import Row, Summary, report_files
from llama_onnx.runtime.reports.parts import Cell, Section, Table
from llama_onnx.runtime.reports.report_file import render_page, write_page

_STATES = ("made", "unchanged", "failed")


def write_report(summary: Summary) -> None:
    """Write page and JSON into the fleet's folder; raises `ResourceError`."""
    page, data = report_files(summary.fleet.out)
    write_page(json.dumps(summary.to_json(), indent=2, ensure_ascii=False) + "\n", data)
    write_page(render(summary), page)


def render(summary: Summary) -> str:
    """Return the page as HTML. Every name is escaped."""
    template = files(__package__).joinpath("fleet_page.html.jinja").read_text("utf-8")
    return render_page(
        template,
        name=summary.fleet.file.name,
        conditions=(
            f"{_count(len(summary.rows), 'task')} on {summary.where}, with "
            f"{_count(summary.threads, 'thread')} each, in {summary.seconds:,.1f} s. "
            f"Packages are in {summary.fleet.out}."
        ),
        version=version("llama-onnx"),
        tiles=tuple(_tiles(summary)),
        sections=tuple(_sections(summary)),
    )


def _tiles(summary: Summary) -> Iterator[tuple[str, str]]:
    for state in _STATES:
        yield state, f"{summary.count(state):,}"
    sizes = [row.result.get("package_bytes", 0) for row in summary.rows]
    yield "size of all packages", _size(sum(sizes))
    died = sum(len(row.died) for row in summary.rows)
    if died:
        yield "processes that died", f"{died:,}"


def _sections(summary: Summary) -> Iterator[Section]:
    failed = [row for row in summary.rows if row.state == "failed"]
    if failed:
        rows = [[Cell(row.task.name), Cell(row.reason, "words")] for row in failed]
        yield Section("What failed", tables=[Table("Reasons", ["task", "reason"], rows)])
    yield Section("All tasks", tables=[_tasks(summary), _needs(summary)])
    died = [(row, reason) for row in summary.rows for reason in row.died]
    if died:
        cells = [[Cell(row.task.name), Cell(reason, "words")] for row, reason in died]
        text = "They were tried again, and went on where they had been."
        yield Section("Processes that died", [text], [Table("Ends", ["task", "how"], cells)])
    noted = [(row, text) for row in summary.rows for text in warnings_of(row.result)]
    if noted:
        cells = [[Cell(row.task.name), Cell(text, "words")] for row, text in noted]
        yield Section("Warnings", tables=[Table("Warnings", ["task", "warning"], cells)])


def _tasks(summary: Summary) -> Table:
    head = ["task", "state", "stages", "size", "bits per weight", "fidelity", "mean KL (nats)"]
    return Table("What was made", head, [_task(row) for row in summary.rows])


def _task(row: Row) -> list[Cell]:
    result = row.result
    return [
        Cell(row.task.name),
        Cell(row.state, "words"),
        Cell(", ".join(result.get("done", ())) or "-", "words"),
        Cell(_size(result.get("package_bytes"))),
        Cell(_number(result.get("bits_per_weight"), ".2f")),
        Cell(result.get("grade", "-"), "words"),
        Cell(_number(result.get("mean_kl"), ".4f")),
    ]


def _needs(summary: Summary) -> Table:
    head = [
        "task",
        "predicted memory",
        "most of the export",
        "most with the proof",
        "export",
        "proof",
        "attempts",
    ]
    rows = [
        [
            Cell(row.task.name),
            Cell(_size(row.memory)),
            Cell(_size(row.result.get("export_peak"))),
            Cell(_size(row.result.get("certify_peak"))),
            Cell(_seconds(row.result.get("export_seconds"))),
            Cell(_seconds(row.result.get("certify_seconds"))),
            Cell(str(row.attempts)),
        ]
        for row in summary.rows
    ]
    return Table("Memory and time of each process", head, rows)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _size(count: Any) -> str:
    if not isinstance(count, int | float):
        return "-"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _seconds(value: Any) -> str:
    return f"{value:,.1f} s" if isinstance(value, int | float) else "-"
