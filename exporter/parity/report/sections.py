"""The content of a report's page, as data: sections of text, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llama_onnx.exporter.parity.measure.report import Greedy, ParityReport
from llama_onnx.exporter.parity.report import charts, words
from llama_onnx.runtime.measure.fidelity import METRICS, Fidelity, grades
from llama_onnx.runtime.measure.metrics import NEAR_TIE, Divergence
from llama_onnx.runtime.measure.situations import LONG_CONTEXT, SITUATIONS
from llama_onnx.runtime.reports.parts import Cell, Section, Table
from llama_onnx.runtime.reports.svg import strip

_ERRORS = {
    "weights": "every weight, against its original",
    "rotary": "the rotary tables at every position, against those of transformers",
    "graph": "the graph with fp32 activations, against PyTorch on the package's weights",
    "shipped": "the package as it ships, against PyTorch on the package's weights",
    "quantization": "PyTorch on the package's weights, against PyTorch on the original weights",
    "total": "the package as it ships, against PyTorch on the original weights",
    "greedy": "greedy continuations by the graph, against PyTorch on the package's weights",
    "files": "the files of the package, against the hashes in its manifest",
    "tokenizer": "the vocabulary, and ids and text of some texts, against the source's tokenizer",
}


def sections(report: ParityReport) -> Iterator[Section]:
    """Yield every section of the page; the verdict is not one of them."""
    yield _situations(report)
    yield _losses(report)
    if report.fidelity:
        yield _fidelity(report.fidelity)
    if report.long:
        yield _long_context(report)
    yield charts.layers(report)
    yield charts.positions(report)
    yield _continuations(report)
    yield _thresholds(report)
    yield _size(report)
    yield _origin(report)


def _situations(report: ParityReport) -> Section:
    graph, shipped, total = map(report.by_situation, ("graph", "shipped", "total"))
    missed = {(v.measure, situation) for v in report.verdicts() for situation in v.missed}
    rows = []
    for situation in (*SITUATIONS, LONG_CONTEXT):
        name = situation.name
        if name not in shipped:
            continue
        sound = {error: (error, name) not in missed for error in ("graph", "shipped", "total")}
        of_graph = graph.get(name)
        rows.append(
            [
                Cell(situation.meaning),
                _figure(of_graph.max_abs if of_graph else None, sound["graph"]),
                _figure(of_graph.relative_l2 if of_graph else None, sound["graph"]),
                _figure(shipped[name].max_abs, sound["shipped"]),
                _figure(shipped[name].relative_l2, sound["shipped"]),
                _figure(shipped[name].mean_kl, sound["shipped"]),
                _figure(total[name].mean_kl, sound["total"]),
                Cell(f"{total[name].same_top1:.1%}"),
            ]
        )
    head = (
        "situation", "graph, largest", "graph, rel. L2", "shipped, largest", "shipped, rel. L2",
        "shipped, mean KL", "total, mean KL", "total, same top-1",
    )  # fmt: skip
    return Section(
        "Errors by situation",
        (
            "“Graph” is the graph with fp32 activations, “shipped” the package as it ships, both "
            "compared with PyTorch on the package's weights: an error here has nothing to do with "
            "precision. “Total” is the package as it ships, compared with PyTorch on the original "
            "weights. ✗ marks the figures of an error that misses a limit in that situation; a "
            "dash marks a situation that only a whole session can run.",
        ),
        (Table("Errors in each situation (logits; KL in nats)", head, rows),),
    )


def _figure(value: float | None, sound: bool) -> Cell:
    if value is None:
        return Cell("–")
    return Cell(f"{value:.1e}" + ("" if sound else " ✗"), "" if sound else "bad")


def _losses(report: ParityReport) -> Section:
    rows = []
    for label, error, situation in words.LOSSES:
        row = report.figures(error, situation)
        changes = (row.mean_dp, row.rms_dp, row.p1_dp, row.p99_dp)
        rows.append(
            [
                Cell(label),
                Cell(f"{row.mean_kl:.2e}{_error(row.mean_kl_error, '.0e')}"),
                *(Cell(f"{kl:.2e}") for kl in (row.p99_kl, row.max_kl)),
                Cell(f"{row.same_top1:.1%}{_error(row.same_top1_error, '.1%')}"),
                Cell(f"{row.top5_overlap:.1%}"),
                *(Cell("–" if value is None else f"{value:+.2%}") for value in changes),
                Cell(words.ratio(row.perplexity_ratio, row.perplexity_ratio_error)),
            ]
        )
    head = (
        "what", "mean KL", "99 % KL", "largest KL", "same top-1", "top-5 overlap", "mean Δp",
        "rms Δp", "1 % Δp", "99 % Δp", "perplexity ratio",
    )  # fmt: skip
    return Section(
        "Loss against the original weights",
        (
            f"Over {report.positions} positions. KL is the divergence from the original's "
            "probabilities in nats, Δp the change of the true next token's probability. "
            "± is a standard error.",
            *([f"Sampled: {sampled}."] if (sampled := words.sampled(report.sample)) else ()),
        ),
        (Table("Against the original weights", head, rows),),
    )


def _error(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"


def _fidelity(found: Fidelity) -> Section:
    limits = {limit.metric: limit for limit in found.limits}
    rows = []
    for metric in METRICS:
        limit, error = limits.get(metric), f"{metric}_error"
        values = [getattr(loss, metric) for loss in (found.shipped, found.weights)]
        errors = [getattr(loss, error) for loss in (found.shipped, found.weights)]
        rows.append(
            [
                Cell(metric),
                *(Cell(f"{v:.4g} ± {e:.2g}") for v, e in zip(values, errors, strict=True)),
                Cell("–" if limit is None else f"{limit.limit:g}"),
                Cell("", "") if limit is None else _outcome(limit.passed),
                Cell("" if limit is None else f"{limit.basis}: {limit.reason}", "words"),
            ]
        )
    head = ("what", "as it ships", "its weights", f"limit of {found.recipe}", "", "reason")
    grades_ = [
        [
            Cell(row.name, "good" if row.name == found.grade else ""),
            *(Cell(_most(getattr(row, metric))) for metric in METRICS),
            Cell(row.reason, "words"),
        ]
        for row in grades()
    ]
    texts = (
        f"Measured on {found.shipped.positions:,} positions of real text ({found.text}), on which "
        f"the original has a perplexity of {found.original_perplexity:.1f}. Errors are standard "
        "errors. The grade is the best one all of whose limits hold.",
    )
    named = ("grade", *METRICS, "such as")
    tables = (
        Table("Loss, and the limits of the recipe", head, rows),
        Table("The grades, and the most that each allows", named, grades_),
    )
    return Section("Fidelity to the original", texts, tables)


def _most(limit: float) -> str:
    return f"{limit:g}" if math.isfinite(limit) else "–"


def _outcome(passed: bool) -> Cell:
    return Cell("ok" if passed else "missed", _kind(passed))


def _long_context(report: ParityReport) -> Section:
    long = report.long
    assert long is not None
    trained = report.trained_length
    text = f"One passage of {long.length:,} tokens, the whole context, measured at some positions."
    if trained:
        text += f" The model was trained on {trained:,} positions; RoPE scaling extends them."
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
    return Section("Up to the end of the context", (text,), (Table("By position", head, rows),))


def _continuations(report: ParityReport) -> Section:
    head = ("prompt", "identical tokens", "", "chosen", "expected", "margin, logits", "")
    tables = [
        Table(
            f"Greedy, {words.GREEDY[one.name]}: {one.identical} of {len(one.divergences)} "
            f"identical, {one.agreement:.1%} of the tokens",
            head,
            [
                _continuation(report, one, number, divergence)
                for number, divergence in enumerate(one.divergences, start=1)
            ],
        )
        for one in report.greedy
    ]
    text = (
        "Each prompt is continued greedily. The margin is the reference's logit of its own choice "
        f"minus that of the token chosen at the first difference; up to {NEAR_TIE:g} logits it is "
        "a near-tie, which rounding can decide."
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
        Cell("near-tie" if words.is_near_tie(divergence) else "differs"),
    ]


def _token(report: ParityReport, token: int) -> str:
    piece = report.about.pieces.get(token)
    return str(token) if piece is None else f"{piece!r} ({token})"


def _thresholds(report: ParityReport) -> Section:
    rows = []
    for verdict in report.verdicts():
        where = f" ({', '.join(filter(None, verdict.missed))})" if any(verdict.missed) else ""
        rows.append(
            [
                Cell(f"{verdict.measure}, {verdict.metric}"),
                Cell(f"{verdict.worst:.2g}"),
                Cell(f"{verdict.limit:g}"),
                Cell("ok" if verdict.passed else f"missed{where}", _kind(verdict.passed)),
                Cell(verdict.reason, "words"),
            ]
        )
    table = Table(
        "The worst value of all situations, and its limit",
        ("what", "worst", "limit", "", "reason for the limit"),
        rows,
    )
    meanings = Table(
        "What is compared with what",
        ("name", "meaning"),
        [[Cell(name), Cell(text, "words")] for name, text in _ERRORS.items()],
    )
    texts = (
        f"Weights: {words.weights(report.weights)}.",
        f"Tokenizer: {words.tokenizer(report.tokenizer)}.",
        f"Files: {words.files(report.about)}.",
    )
    return Section("Limits, and the reasons for them", texts, (table, meanings))


def _kind(passed: bool) -> str:
    return "good" if passed else "bad"


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
        f"{total / 1e6:,.1f} MB in all, {about.bits_per_weight:.2f} bits per weight. Plain "
        f"onnxruntime reads a prompt of {speed.prompt_tokens} tokens at {speed.prefill_rate:,.0f} "
        f"tokens/s and writes {speed.new_tokens} more at {speed.decode_rate:,.1f} tokens/s on "
        f"{about.machine}: one run after a warm-up run, an indication rather than a benchmark."
    )
    table = Table("Bytes by part", ("part", "size", "share", ""), rows)
    return Section("Size and speed", (text,), (table,))


def _origin(report: ParityReport) -> Section:
    about = report.about
    facts = [
        ("package", report.package),
        ("original", report.original),
        ("provider", report.provider),
        ("machine", about.machine),
        *about.versions.items(),
    ]
    changed = {True: "unchanged", False: "changed since the export", None: "not in the manifest"}
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
        "Origin",
        tables=(
            Table(
                "What was measured, and with what",
                ("what", ""),
                [[Cell(name), Cell(value, "words")] for name, value in facts],
            ),
            Table("Files of the package", ("file", "bytes", "manifest", "sha256"), hashes),
        ),
    )
