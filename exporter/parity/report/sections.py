"""What stands on the page of a parity report, as data: sections of words, tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llama_onnx.exporter.parity.measure.report import Curve, Greedy, ParityReport
from llama_onnx.exporter.parity.report import words
from llama_onnx.exporter.parity.report.svg import Series, histogram, log_chart, strip
from llama_onnx.runtime.measure.metrics import NEAR_TIE, Comparison, Divergence
from llama_onnx.runtime.measure.situations import LONG_CONTEXT, SITUATIONS
from llama_onnx.runtime.measure.thresholds import Threshold

_CURVES = 6  # passages that get charts of their own

_ERRORS = {
    "weights": "every weight, against its original",
    "rotary": "the rotary tables at every position, against transformers' own",
    "graph": "the graph with fp32 activations, against PyTorch on the same weights",
    "shipped": "the package as it ships, against PyTorch on the same weights",
    "quantization": "PyTorch on the package's weights, against the original ones",
    "total": "the package as it ships, against the original",
    "greedy": "greedy continuations of the graph, against the same weights",
}
_SHORT = {
    "quantization": ("the weights' rounding alone", "first"),
    "total": ("the package as it ships", "second"),
}


@dataclass(frozen=True)
class Cell:
    """`kind` is a class of the style sheet: "good", "bad", "words", "code" or none."""

    text: str | Markup
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """`head` names the columns; the first cell of a row is its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A chart with its legend."""

    title: str
    caption: str
    series: Sequence[Series]
    chart: Markup


@dataclass(frozen=True)
class Section:
    """Words first, then tables, then figures."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


def sections(report: ParityReport) -> Iterator[Section]:
    """All of the report, the verdict aside."""
    yield _situations(report)
    yield _lost(report)
    if report.long:
        yield _long(report)
    yield _layers(report)
    yield _positions(report)
    yield _continuations(report)
    yield _thresholds(report)
    yield _size(report)
    yield _origin(report)


def figures_of(report: ParityReport, error: str, situation: str = "") -> Comparison:
    """The figures of one measurement."""
    return next(
        m.figures for m in report.measurements if (m.error, m.situation) == (error, situation)
    )


def _situations(report: ParityReport) -> Section:
    found = {(m.error, m.situation): m.figures for m in report.measurements}
    missed = {(c.threshold.measure, c.situation) for c in report.checks if not c.passed}
    rows = []
    for situation in (*SITUATIONS, LONG_CONTEXT):
        graph, shipped, total = (
            found.get((error, situation.name)) for error in ("graph", "shipped", "total")
        )
        if shipped is None or total is None:
            continue
        sound = {e: (e, situation.name) not in missed for e in ("graph", "shipped", "total")}
        rows.append(
            [
                Cell(situation.meaning),
                _figure(graph.max_abs if graph else None, sound["graph"]),
                _figure(graph.relative_l2 if graph else None, sound["graph"]),
                _figure(shipped.max_abs, sound["shipped"]),
                _figure(shipped.relative_l2, sound["shipped"]),
                _figure(shipped.mean_kl, sound["shipped"]),
                _figure(total.mean_kl, sound["total"]),
                Cell(f"{total.same_top1:.1%}"),
            ]
        )
    head = (
        "fed", "graph, largest", "graph, rel. L2", "shipped, largest", "shipped, rel. L2",
        "shipped, mean KL", "total, mean KL", "total, same top-1",
    )  # fmt: skip
    return Section(
        "However it is fed, it has to say the same",
        (
            "Graph is the graph with fp32 activations and shipped the package as it is, both "
            "against PyTorch on the package's own weights: what is wrong here is no matter of "
            "precision. Total is the package as it is against the original. A figure with ✗ misses "
            "a limit of its row; a dash stands where a way of feeding belongs to whole sessions.",
        ),
        (Table("Errors in each situation (logits; KL in nats)", head, rows),),
    )


def _figure(value: float | None, sound: bool) -> Cell:
    if value is None:
        return Cell("–")
    return Cell(f"{value:.1e}" + ("" if sound else " ✗"), "" if sound else "bad")


def _lost(report: ParityReport) -> Section:
    sides = [
        ("the weights' rounding alone", "quantization", ""),
        ("the package, one pass", "total", "prefill"),
        ("the package, token by token", "total", "decode"),
    ]
    rows = []
    for label, error, situation in sides:
        row = figures_of(report, error, situation)
        shares = (row.mean_dp, row.rms_dp, row.p1_dp, row.p99_dp)
        rows.append(
            [
                Cell(label),
                *(Cell(f"{kl:.2e}") for kl in (row.mean_kl, row.p99_kl, row.max_kl)),
                Cell(f"{row.same_top1:.1%}"),
                Cell(f"{row.top5_overlap:.1%}"),
                *(Cell("–" if value is None else f"{value:+.2%}") for value in shares),
                Cell(words.ratio(row.perplexity_ratio, row.perplexity_ratio_error)),
            ]
        )
    head = (
        "what", "mean KL", "99 % KL", "largest KL", "same top-1", "top-5 overlap", "mean Δp",
        "rms Δp", "1 % Δp", "99 % Δp", "perplexity ratio",
    )  # fmt: skip
    return Section(
        "What is lost against the original",
        (
            f"Over {report.positions} positions. KL is the divergence from the original's "
            "probabilities in nats, Δp the change of the true next token's probability; the ratio "
            "of the perplexities has its standard error beside it.",
        ),
        (Table("Against the original weights", head, rows),),
    )


def _long(report: ParityReport) -> Section:
    long = report.long
    assert long is not None
    trained = report.trained_length
    text = (
        f"One passage of {long.length:,} tokens, the whole context, looked at where it may break."
    )
    if trained:
        text += f" The model was trained on {trained:,} positions, and stretched from there."
    rows = [
        [
            Cell(f"{row.position + 1:,}"),
            Cell("beyond" if row.beyond_training else "within"),
            *(Cell(f"{value:.1e}") for value in (row.graph, row.shipped, row.kl)),
        ]
        for row in long.positions
    ]
    head = (
        "position",
        "trained length",
        "graph, rel. L2",
        "shipped, rel. L2",
        "KL to the original",
    )
    return Section("To the context's end", (text,), (Table("By position", head, rows),))


def _layers(report: ParityReport) -> Section:
    names = [layer.stage.removeprefix("layer ") for layer in report.layers]
    both = [
        Series("the graph", "first", list(enumerate(layer.graph for layer in report.layers))),
        Series(
            "the weights' rounding",
            "second",
            list(enumerate(layer.quantization for layer in report.layers)),
        ),
    ]
    row = _limit(report, "graph", "relative_l2")
    if row:
        line = [(0.0, row.limit), (len(names) - 1.0, row.limit)]
        both.append(Series("the graph's limit, at the head", "limit", line))
    chart = log_chart(
        both,
        title="Relative L2 error behind each layer: " + _range_in_words(both[:2]),
        x_label="behind embedding, layer, head",
        y_label="relative L2",
        x_names=["emb.", *names[1:-1], names[-1]],
    )
    caption = "Relative L2 of the hidden states; behind the head, of the logits. "
    return Section(
        "Where error arises, and how it is spread",
        figures=(
            Figure("Error by layer", caption + _notes(both), both, chart),
            _distribution(report),
        ),
    )


def _range_in_words(series: Sequence[Series]) -> str:
    ends = ((one.label, one.points[-1][1]) for one in series)
    return "; ".join(f"{label} ends at {value:.1e}" for label, value in ends) + "."


def _limit(report: ParityReport, measure: str, metric: str) -> Threshold | None:
    rows = (check.threshold for check in report.checks)
    return next((row for row in rows if (row.measure, row.metric) == (measure, metric)), None)


def _notes(series: Sequence[Series]) -> str:
    """What a logarithmic axis cannot show, in words."""
    values = [y for one in series for _, y in one.points]
    notes = ["Zero is drawn at the bottom."] if any(value <= 0 for value in values) else []
    missing = sum(value != value for value in values)
    if missing:
        notes.append(f"{missing} values are not a number and are not drawn.")
    return " ".join(notes)


def _positions(report: ParityReport) -> Section:
    passages = sorted({curve.passage for curve in report.curves})
    figures = []
    for passage in passages[:_CURVES]:
        curves = [curve for curve in report.curves if curve.passage == passage]
        figures.append(_curve(report, curves, "kl", "KL, nats", "KL divergence"))
        figures.append(_curve(report, curves, "relative_l2", "relative L2", "Relative L2"))
    left_out = len(passages) - _CURVES
    more = (f"{left_out} more passages are in the JSON.",) if left_out > 0 else ()
    return Section("Position by position", more, (), figures)


def _distribution(report: ParityReport) -> Figure:
    series = []
    for error, (label, style) in _SHORT.items():
        values = [kl for curve in report.curves if curve.error == error for kl in curve.kl]
        series.append(Series(label, style, list(enumerate(values))))
    chart = histogram(
        series,
        title="How often the KL divergence of a position falls into each half decade.",
        x_label="KL to the original, nats",
    )
    caption = "Each position counts once; the axis is logarithmic. " + _notes(series)
    return Figure("Distribution of KL", caption, series, chart)


def _curve(
    report: ParityReport, curves: Sequence[Curve], kind: str, y_label: str, title: str
) -> Figure:
    number, longest = curves[0].passage + 1, max(len(curve.kl) for curve in curves)
    series = []
    for curve in curves:
        label, style = _SHORT[curve.error]
        values = getattr(curve, kind)
        first = longest - len(values) + 1  # a graph for the last position has no others
        series.append(Series(label, style, list(enumerate(values, start=first))))
    prompt = longest - report.greedy[0].tokens
    what = f"{title} at each position of passage {number}"
    chart = log_chart(
        series,
        title=f"{what}, against the original: {_range_in_words(series)}",
        x_label="position",
        y_label=y_label,
        marks=[(prompt, "prompt")] if 0 < prompt < longest else (),
    )
    caption = f"Left of the mark the prompt, right of it {report.greedy[0].tokens} greedy tokens. "
    return Figure(what, caption + _notes(series), series, chart)


def _continuations(report: ParityReport) -> Section:
    head = ("prompt", "identical tokens", "", "parts with", "instead of", "margin, logits", "")
    names = {
        "graph": "The graph with fp32 activations, against the package's weights",
        "shipped": "The package as it ships, against the original weights",
    }
    tables = [
        Table(
            f"{names[one.name]}: {one.identical} of {len(one.divergences)} identical, "
            f"{one.agreement:.1%} of the tokens",
            head,
            [
                _continuation(report, one, number, divergence)
                for number, divergence in enumerate(one.divergences, start=1)
            ],
        )
        for one in report.greedy
    ]
    text = (
        "Each prompt is continued greedily. The margin is how far the reference has its own choice "
        f"ahead where the two part; up to {NEAR_TIE:g} logits it is a near-tie, which rounding "
        "alone decides."
    )
    return Section("Greedy continuations", (text,), tables)


def _continuation(
    report: ParityReport, one: Greedy, number: int, divergence: Divergence | None
) -> list[Cell]:
    same = one.tokens if divergence is None else divergence.step
    bar = strip(same / one.tokens, f"{same} of {one.tokens}")
    row = [Cell(str(number)), Cell(f"{same} of {one.tokens}"), Cell(bar)]
    if divergence is None:
        return [*row, Cell("–"), Cell("–"), Cell("–"), Cell("identical", "good")]
    return [
        *row,
        Cell(_token(report, divergence.chosen)),
        Cell(_token(report, divergence.expected)),
        Cell(f"{divergence.margin:.2g}"),
        Cell("near-tie" if words.is_near_tie(divergence) else "parts"),
    ]


def _token(report: ParityReport, token: int) -> str:
    piece = report.about.pieces.get(token)
    return str(token) if piece is None else f"{piece!r} ({token})"


def _thresholds(report: ParityReport) -> Section:
    rows = []
    for row in dict.fromkeys(check.threshold for check in report.checks):
        checks = [check for check in report.checks if check.threshold == row]
        passed = all(check.passed for check in checks)
        missed = ", ".join(c.situation for c in checks if not c.passed and c.situation)
        outcome = "ok" if passed else f"missed ({missed})" if missed else "missed"
        rows.append(
            [
                Cell(f"{row.measure}, {row.metric}"),
                Cell(f"{words.worst([check.value for check in checks]):.2g}"),
                Cell(f"{row.limit:g}"),
                Cell(outcome, "good" if passed else "bad"),
                Cell(row.reason, "words"),
            ]
        )
    table = Table(
        "The worst of all situations against each limit",
        ("what", "worst", "limit", "", "why this limit"),
        rows,
    )
    meanings = Table(
        "What is held against what",
        ("name", "meaning"),
        [[Cell(name), Cell(text, "words")] for name, text in _ERRORS.items()],
    )
    texts = (
        f"Weights: {words.weights(report.weights)}.",
        f"Tokenizer: {words.tokenizer(report.tokenizer)}.",
    )
    return Section("Limits, and why they are what they are", texts, (table, meanings))


def _size(report: ParityReport) -> Section:
    about, speed = report.about, report.speed
    total = sum(about.parts.values())
    rows = [
        [
            Cell(part),
            Cell(f"{size / 1e6:,.2f} MB"),
            Cell(f"{size / total:.1%}"),
            Cell(strip(size / total, f"{size / total:.1%} of the package")),
        ]
        for part, size in sorted(about.parts.items(), key=lambda entry: -entry[1])
    ]
    text = (
        f"{total / 1e6:,.1f} MB in all, {about.bits_per_weight:.2f} bits a weight. Plain "
        f"onnxruntime reads a prompt of {speed.prompt_tokens} tokens at {speed.prefill_rate:,.0f} "
        f"tokens/s and writes {speed.new_tokens} more at {speed.decode_rate:,.1f} tokens/s, in one "
        f"run after one to warm up, on {about.machine}: an indication, no benchmark."
    )
    return Section(
        "Size and speed", (text,), (Table("Bytes by part", ("part", "size", "share", ""), rows),)
    )


def _origin(report: ParityReport) -> Section:
    about = report.about
    facts = [
        ("package", report.package),
        ("reference", report.original),
        ("ran on", report.provider),
        ("machine", about.machine),
        *about.versions.items(),
    ]
    changed = {True: "as made", False: "CHANGED since the export", None: "not in the manifest"}
    hashes = [
        [
            Cell(file.name),
            Cell(f"{file.size:,}"),
            Cell(changed[file.as_made], "bad" if file.as_made is False else ""),
            Cell(file.sha256, "code"),
        ]
        for file in about.files
    ]
    return Section(
        "Made of, measured with",
        tables=(
            Table(
                "Where the figures come from",
                ("what", ""),
                [[Cell(name), Cell(value, "words")] for name, value in facts],
            ),
            Table("Files of the package", ("file", "bytes", "manifest", "sha256"), hashes),
        ),
    )
