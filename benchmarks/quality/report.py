"""The results as a table and as a plot, for the terminal and for docs/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import chart
from benchmarks.quality.model_process import REPOSITORY
from benchmarks.quality.rows import BASE, OURS, ROWS
from benchmarks.quality.workspace import Workspace

PAGE = REPOSITORY / "docs" / "quality.md"
README = REPOSITORY / "README.md"
PLOT = REPOSITORY / "docs" / "assets" / "quality.svg"
RESULTS = REPOSITORY / "docs" / "assets" / "quality.json"
START, STOP = "<!-- quality: begin -->", "<!-- quality: end -->"

SHORT_COLUMNS = (0, 2, 3, 5, 7)
"""Of COLUMNS, those in the README's table."""

SHORT_PEERS = (
    "builder-default",
    "builder-k-quant",
    "builder-k-quant-mixed",
    "q4_0",
    "q4_k_m",
    "q6_k",
)
"""The peers in the README's table, besides all of ours that are not calibrated on another text."""

Result = Mapping[str, Any]

COLUMNS = (
    "",
    "calibrated on",
    "bits",
    "mean KL",
    "p99 KL",
    "same top-1",
    "perplexity",
    "answers",
    "prefill",
    "decode",
)


def load(work: Workspace) -> list[Result]:
    """Return the results that there are, in the order of the rows."""
    files = [work.result(name) for name in ROWS]
    return [json.loads(file.read_text("utf-8")) for file in files if file.exists()]


def table(results: Sequence[Result], columns: Sequence[int] = range(len(COLUMNS))) -> str:
    """Return a Markdown table: each group by bits. `columns` are indices in COLUMNS."""
    lines = ["| " + " | ".join(COLUMNS[i] for i in columns) + " |", "|" + " --- |" * len(columns)]
    groups = list(dict.fromkeys(result["group"] for result in results))
    for group in groups:
        members = [result for result in results if result["group"] == group]
        for result in sorted(members, key=lambda one: float(one["bits"])):
            cells = _cells(result)
            lines.append("| " + " | ".join(cells[i] for i in columns) + " |")
    return "\n".join(lines)


def _cells(result: Result) -> list[str]:
    found = result["figures"]
    name = f"{result['group']} {result['label']}"
    return [
        f"**{name}**" if result["group"] == OURS else name,
        result["calibration"],
        f"{result['bits']:.2f}",
        f"{found['kl']:.4f} ± {found['kl_error']:.4f}",
        f"{found['kl_p99']:.2f}",
        f"{found['same_top1']:.1%}",
        f"x {found['perplexity_ratio']:.3f}",
        right_answers(result["answers"]),
        _speed(result, "prefill"),
        _speed(result, "decode"),
    ]


def right_answers(answers: Sequence[Result]) -> str:
    """Return "right of counted"; only questions that the original answers count."""
    counted = [answer for answer in answers if answer["counts"]]
    return f"{sum(answer['right'] for answer in counted)} of {len(counted)}"


def _speed(result: Result, part: str) -> str:
    if "speed" not in result:
        return ""
    measured = result["speed"][part]
    rate = f"{measured['tokens_per_second']:.0f}"
    return rate if result["name"] == BASE else f"{rate} (x {measured['ratio']:.2f})"


def points(results: Sequence[Result]) -> list[chart.Point]:
    """Return a point for each result."""
    return [
        chart.Point(one["bits"], one["figures"]["kl"], one["group"], _short(one)) for one in results
    ]


def _short(result: Result) -> str:
    text = str(result["label"]).removeprefix("preset ")
    return (
        f"{text} ({result['calibration']})"
        if result["group"] == OURS and (result["calibration"] not in ("", "shipped"))
        else text
    )


def beaten(results: Sequence[Result]) -> list[tuple[Result, Result | None]]:
    """Return each peer's result with one of ours that has no more bits and no more KL, if any.

    Of several, the one with the smallest KL.
    """
    ours = [one for one in results if one["group"] == OURS]
    pairs: list[tuple[Result, Result | None]] = []
    for peer in (one for one in results if one["group"] != OURS):
        better = [
            one
            for one in ours
            if one["bits"] <= peer["bits"] and one["figures"]["kl"] <= peer["figures"]["kl"]
        ]
        pairs.append((peer, min(better, key=lambda one: float(one["figures"]["kl"]), default=None)))
    return pairs


def beaten_lines(results: Sequence[Result]) -> str:
    """Say for each peer which of ours has no more bits and no more KL."""
    lines = ["| peer | bits | mean KL | ours with no more of either |", "| --- | --- | --- | --- |"]
    for peer, better in beaten(results):
        ours = "**none**"
        if better is not None:
            ours = f"{_short(better)}: {better['bits']:.2f}, {better['figures']['kl']:.4f}"
        name = f"{peer['group']} {peer['label']}"
        lines.append(f"| {name} | {peer['bits']:.2f} | {peer['figures']['kl']:.4f} | {ours} |")
    return "\n".join(lines)


def write(work: Workspace) -> None:
    """Write plot, results and tables into docs/."""
    results = load(work)
    facts = json.loads(work.model_facts.read_text("utf-8"))
    content = {"model": facts, "rows": results}
    RESULTS.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    PLOT.write_text(chart.draw(points(results)), encoding="utf-8")
    _replace(PAGE, f"{table(results)}\n\n{beaten_lines(results)}\n\n{_moved(facts)}")
    short = [one for one in results if one["name"] in SHORT_PEERS or _is_own(one)]
    _replace(README, table(short, SHORT_COLUMNS))


def _moved(facts: Mapping[str, float]) -> str:
    return (
        "Moved off its grid, the model's logits differ from the file's by at most "
        f"{facts['largest_logit_difference']:.1e} in float32, at a standard deviation of "
        f"{facts['logit_standard_deviation']:.1f}."
    )


def _is_own(result: Result) -> bool:
    return result["group"] == OURS and result["calibration"] in ("", "shipped")


def _replace(page: Path, text: str) -> None:
    """Put `text` between the marks on a page."""
    content = page.read_text("utf-8")
    before, rest = content.split(START)
    _, after = rest.split(STOP)
    page.write_text(f"{before}{START}\n{text}\n{STOP}{after}", encoding="utf-8")
