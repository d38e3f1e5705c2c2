"""Measurements as an HTML page with tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np

from llama_onnx.runtime.bench.bench import Bench
from llama_onnx.runtime.bench.bench_table import remarks, rows
from llama_onnx.runtime.reports.parts import Cell, Figure, Section, Table
from llama_onnx.runtime.reports.report_file import render_page, write_page
from llama_onnx.runtime.reports.svg import Series, line_chart

_STYLES = "first", "second"


def write_report(measured: Bench, file: Path) -> None:
    """Write a page about `measured` to `file`; raises `ResourceError`."""
    write_page(render(measured), file)


def render(measured: Bench) -> str:
    """Return the page as HTML. Every name that comes from a package is escaped."""
    template = files(__package__).joinpath("bench_page.html.jinja").read_text("utf-8")
    return render_page(
        template,
        name=" and ".join(measured.names),
        conditions=_conditions(measured),
        tiles=tuple(_tiles(measured)),
        sections=(*_verdicts(measured), _figures(measured), _table(measured)),
    )


def _packages(measured: Bench) -> list[Bench]:
    return [measured] if measured.against is None else [measured, measured.against]


def _conditions(measured: Bench) -> str:
    runs = f"medians of {measured.repeats} runs" if measured.repeats > 1 else "one run"
    threads = f", --threads {measured.threads}" if measured.threads else ""
    processor = measured.processor or "unknown processor"
    return (
        f"{processor}{threads}: {runs}, a prompt of {measured.prompt_tokens} and an answer of "
        f"{measured.new_tokens} tokens."
    )


def _tiles(measured: Bench) -> Iterator[tuple[str, str]]:
    for name, one in zip(measured.names, _packages(measured), strict=True):
        yield "package", name
        yield "engine, provider", f"{one.engine}, {one.provider['name']}"
        yield "prefill", f"{one.prefill_rate.median:,.0f} tokens/s"
        if one.decode_rate:
            yield "decode", f"{one.decode_rate.median:,.1f} tokens/s"
        if one.streams:
            most = one.streams[-1]
            yield f"decode of {most.streams} streams", f"{most.rate.median:,.1f} tokens/s"


def _verdicts(measured: Bench) -> Iterator[Section]:
    if measured.comparison:
        yield Section("Which is faster", [one.sentence for one in measured.comparison])


def _table(measured: Bench) -> Section:
    head = ["", *measured.names, "speed of the second"]
    if measured.against is None:
        head = ["", "median", "range"]
    body = [[Cell(row.name), *map(Cell, row.values), Cell(row.extent)] for row in rows(measured)]
    caption = "Medians, and the least and most of all runs"
    if measured.against is not None:
        caption = "Medians, and the speed of the second relative to the first, in pairs of runs"
    table = Table(caption, head, body)
    return Section("All figures", remarks(measured), [table])


def _figures(measured: Bench) -> Section:
    figures = [_streams(measured), _turns(measured), _gaps(measured)]
    return Section("Plots", figures=[figure for figure in figures if figure is not None])


def _streams(measured: Bench) -> Figure | None:
    series = _series(
        measured,
        lambda one: [(float(row.streams), row.rate.median) for row in one.streams],
    )
    return _figure(
        series,
        "Decode by number of streams",
        "Tokens a second of all streams together, median.",
        "answers at once",
        "tokens/s",
    )


def _turns(measured: Bench) -> Figure | None:
    series = _series(
        measured,
        lambda one: [(float(row.turn), 1e3 * row.first_token_seconds.median) for row in one.turns],
    )
    return _figure(
        series,
        "First token by turn of a chat",
        "Time from the message to the first token of the answer, median.",
        "turn",
        "milliseconds",
    )


def _gaps(measured: Bench) -> Figure | None:
    def points(one: Bench) -> list[tuple[float, float]]:
        gaps = [gap for run in one.runs.single for gap in run.gaps]
        if not gaps:
            return []
        shares = range(100)
        return list(zip(map(float, shares), 1e3 * np.percentile(gaps, shares), strict=True))

    return _figure(
        _series(measured, points),
        "Time from token to token",
        "One answer alone: the share of the gaps that are shorter.",
        "percent of the gaps",
        "milliseconds",
    )


def _series(measured: Bench, points: Callable[[Bench], list[tuple[float, float]]]) -> list[Series]:
    named = zip(measured.names, _STYLES, _packages(measured), strict=False)
    found = [Series(name, style, points(one)) for name, style, one in named]
    return [one for one in found if one.points]


def _figure(
    series: list[Series], title: str, caption: str, x_label: str, y_label: str
) -> Figure | None:
    if not series:
        return None
    ends = "; ".join(f"{one.label} ends at {one.points[-1][1]:,.4g}" for one in series)
    chart = line_chart(
        series, title=f"{title}: {ends} {y_label}.", x_label=x_label, y_label=y_label
    )
    return Figure(title, caption, series, chart)
