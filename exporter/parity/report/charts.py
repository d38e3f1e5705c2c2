"""The sections of a report's page that have charts: by layer, distribution, by position."""

from __future__ import annotations

from collections.abc import Sequence

from llama_onnx.exporter.parity.measure.report import Curve, ParityReport
from llama_onnx.runtime.reports.parts import Figure, Section
from llama_onnx.runtime.reports.svg import Series, histogram, log_chart

_MAX_PASSAGES = 6  # that get charts

_LINES = {
    "quantization": ("the package's weights", "first"),
    "total": ("the package as it ships", "second"),
}


def layers(report: ParityReport) -> Section:
    """Return the error by layer, and the distribution of the KL divergence."""
    names = [layer.stage.removeprefix("layer ") for layer in report.layers]
    both = [
        Series("the graph", "first", list(enumerate(layer.graph for layer in report.layers))),
        Series(
            "quantization of the weights",
            "second",
            list(enumerate(layer.quantization for layer in report.layers)),
        ),
    ]
    series, limit = list(both), report.limit("graph", "relative_l2")
    if limit is not None:
        line = [(0.0, limit), (len(names) - 1.0, limit)]
        series.append(Series("limit of the graph, after the head", "limit", line))
    chart = log_chart(
        series,
        title="Relative L2 error after each layer: " + _last_values(both),
        x_label="after embedding, layer, head",
        y_label="relative L2",
        x_names=["emb.", *names[1:-1], names[-1]],
    )
    caption = "Relative L2 error of the hidden states; after the head, of the logits. "
    return Section(
        "Error by layer, and its distribution",
        figures=(
            Figure("Error by layer", caption + _notes(series), series, chart),
            _distribution(report),
        ),
    )


def positions(report: ParityReport) -> Section:
    """Return both errors against the original weights at each position of the first passages."""
    passages = sorted({curve.passage for curve in report.curves})
    figures = []
    for passage in passages[:_MAX_PASSAGES]:
        curves = [curve for curve in report.curves if curve.passage == passage]
        figures.append(_curve(report, curves, "kl", "KL, nats", "KL divergence"))
        figures.append(_curve(report, curves, "relative_l2", "relative L2", "Relative L2 error"))
    left_out = len(passages) - _MAX_PASSAGES
    more = (f"{left_out} more passages are in the JSON.",) if left_out > 0 else ()
    return Section("Error by position", more, (), figures)


def _last_values(series: Sequence[Series]) -> str:
    ends = ((one.label, one.points[-1][1]) for one in series)
    return "; ".join(f"{label} ends at {value:.1e}" for label, value in ends) + "."


def _notes(series: Sequence[Series]) -> str:
    """Return what a logarithmic axis cannot show, as text."""
    values = [y for one in series for _, y in one.points]
    notes = ["Zero is drawn at the bottom."] if any(value <= 0 for value in values) else []
    missing = sum(value != value for value in values)
    if missing:
        notes.append(f"{missing} values are NaN and are not drawn.")
    return " ".join(notes)


def _distribution(report: ParityReport) -> Figure:
    series = []
    for error, (label, style) in _LINES.items():
        values = [kl for curve in report.curves if curve.error == error for kl in curve.kl]
        series.append(Series(label, style, list(enumerate(values))))
    chart = histogram(
        series,
        title="Share of positions with a KL divergence in each half decade.",
        x_label="KL divergence from the original, nats",
    )
    caption = "Each position counts once; the axis is logarithmic. " + _notes(series)
    return Figure("Distribution of the KL divergence", caption, series, chart)


def _curve(
    report: ParityReport, curves: Sequence[Curve], kind: str, y_label: str, title: str
) -> Figure:
    number, longest = curves[0].passage + 1, max(len(curve.kl) for curve in curves)
    series = []
    for curve in curves:
        label, style = _LINES[curve.error]
        values = getattr(curve, kind)
        first = longest - len(values) + 1  # a graph with logits of the last position has one value
        series.append(Series(label, style, list(enumerate(values, start=first))))
    tokens = report.greedy[0].tokens
    prompt = longest - tokens
    caption_title = f"{title} at each position of passage {number}"
    chart = log_chart(
        series,
        title=f"{caption_title}, against the original weights: {_last_values(series)}",
        x_label="position",
        y_label=y_label,
        marks=[(prompt, "prompt")] if 0 < prompt < longest else (),
    )
    caption = f"The prompt is left of the mark, {tokens} greedy tokens are right of it. "
    return Figure(caption_title, caption + _notes(series), series, chart)
