"""A parity report as one HTML page that needs only a browser: no network, no script.

Its content is data (`sections.py`, `charts.py`), its head is in page.html.jinja, and what it shares
with other reports in `runtime/reports`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from llama_onnx.exporter.parity.measure.report import ParityReport
from llama_onnx.exporter.parity.report.sections import sections
from llama_onnx.exporter.parity.report.words import cost, fidelity, limits, verdict
from llama_onnx.runtime.reports.report_file import render_page, write_page


def write_report(report: ParityReport, file: Path) -> None:
    """Write `report` to `file`, which appears complete or not at all; raises `ResourceError`."""
    write_page(render(report), file)


def render(report: ParityReport) -> str:
    """Return the page as HTML. Every name that comes from a package is escaped."""
    template = files(__package__).joinpath("page.html.jinja").read_text("utf-8")
    outcome, _, sentence = verdict(report).partition(": ")
    grade, lost = fidelity(report.fidelity)
    return render_page(
        template,
        name=Path(report.package).name or report.package,
        passed=report.passed,
        outcome=outcome.capitalize(),
        verdict=_as_sentence(report, sentence),
        accepted=report.fidelity is None or report.fidelity.allowed,
        grade=grade.capitalize(),
        fidelity=tuple(_sentence(line) for line in (lost, *limits(report.fidelity))),
        cost=cost(report.figures("quantization")),
        shipped_cost=_shipped_cost(report),
        tiles=tuple(_tiles(report)),
        sections=tuple(sections(report)),
    )


def _as_sentence(report: ParityReport, verdict: str) -> str:
    if report.passed:
        return f"All {len(report.verdicts())} limits hold in every situation."
    return verdict[0].upper() + verdict[1:]


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _shipped_cost(report: ParityReport) -> str:
    """Return the loss of the package as it ships, or "" if it is that of its weights."""
    if report.activations == "fp32" and report.passed:
        return ""
    total = report.figures("total", "decode")
    return (
        f"As it ships, with {report.activations} activations and token by token, the package has a "
        f"mean KL divergence of {total.mean_kl:.2g} nats and the original's likeliest next token "
        f"at {total.same_top1:.1%} of the positions."
    )


def _tiles(report: ParityReport) -> Iterator[tuple[str, str]]:
    graph, speed = report.figures("graph", "prefill"), report.speed
    yield "weights, activations", f"{report.precision}, {report.activations}"
    yield "package", f"{sum(file.size for file in report.about.files) / 1e6:,.1f} MB"
    yield "bits per weight", f"{report.about.bits_per_weight:.2f}"
    yield "largest graph error", f"{graph.max_abs:.1e}"
    yield "mean KL from the original", f"{report.figures('total', 'decode').mean_kl:.2g} nats"
    yield (
        f"prefill of {speed.prompt_tokens}, decode of {speed.new_tokens}",
        f"{speed.prefill_rate:,.0f}, {speed.decode_rate:,.0f} tokens/s",
    )
