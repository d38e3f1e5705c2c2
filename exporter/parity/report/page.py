"""A parity report as one HTML page that needs nothing but a browser: no network, no script.

What stands on it is data (`sections.py`), how it looks is in page.html.jinja and page.css.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.report.sections import figures_of, sections
from llama_onnx.exporter.parity.report.words import cost, verdict
from llama_onnx.targets.errors import ResourceError, UsageError


def check_place(file: Path) -> None:
    """Raise `UsageError` where no report can be written: before minutes are spent on measuring."""
    if not file.parent.is_dir():
        raise UsageError(f"{file} cannot be written: {file.parent} is not a folder; make it first.")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UsageError(f"{file} cannot be written: choose another place for the report.")


def write_report(report: ParityReport, file: Path) -> None:
    """Write `report` to `file`, which appears whole or not at all; raises `ResourceError`."""
    aside = file.with_name(f"{file.name}.partial")
    try:
        aside.write_text(render(report), encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ResourceError(f"{file} cannot be written: {error.strerror or error}.") from None


def render(report: ParityReport) -> str:
    """The page as text. Whatever a package calls itself is text on it, never markup."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    here = files(__package__)
    template = environment.from_string(here.joinpath("page.html.jinja").read_text("utf-8"))
    outcome, _, sentence = verdict(report).partition(": ")
    return template.render(
        css=Markup(here.joinpath("page.css").read_text("utf-8")),
        name=Path(report.package).name or report.package,
        passed=report.passed,
        outcome=outcome.capitalize(),
        verdict=_as_sentence(report, sentence),
        cost=cost(figures_of(report, "quantization")),
        shipped_cost=_shipped_cost(report),
        tiles=tuple(_tiles(report)),
        sections=tuple(sections(report)),
    )


def _as_sentence(report: ParityReport, verdict: str) -> str:
    if report.passed:
        limits = len({check.threshold for check in report.checks})
        what = f"Each of the {limits} limits holds in every situation"
        return f"{what}." if report.tokenizer is None else f"{what}; the tokenizer is the source's."
    return verdict[0].upper() + verdict[1:]


def _shipped_cost(report: ParityReport) -> str:
    """What the whole package loses, where that is more than its weights' rounding."""
    if report.activations == "fp32" and report.passed:
        return ""
    total = figures_of(report, "total", "decode")
    return (
        f"As it ships, with {report.activations} activations and token by token, the package is "
        f"{total.mean_kl:.2g} nats from the original and agrees with it on the likeliest next "
        f"token at {total.same_top1:.1%} of the positions."
    )


def _tiles(report: ParityReport) -> Iterator[tuple[str, str]]:
    graph, speed = figures_of(report, "graph", "prefill"), report.speed
    yield "weights, activations", f"{report.precision}, {report.activations}"
    yield "package", f"{sum(file.size for file in report.about.files) / 1e6:,.1f} MB"
    yield "bits a weight", f"{report.about.bits_per_weight:.2f}"
    yield "graph error, largest", f"{graph.max_abs:.1e}"
    yield "KL to the original", f"{figures_of(report, 'total', 'decode').mean_kl:.2g} nats"
    yield (
        f"prefill of {speed.prompt_tokens}, decode of {speed.new_tokens}",
        f"{speed.prefill_rate:,.0f}, {speed.decode_rate:,.0f} tokens/s",
    )
