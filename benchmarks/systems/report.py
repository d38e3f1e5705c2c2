"""The table of `nox -s bench`, and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.limits import Limits, describe
from benchmarks.quality.workspace import PARAMETERS

DOCS = Path(__file__).parents[2] / "docs"
START, END = "<!-- systems -->", "<!-- /systems -->"
PLOTTED = ("prefill 512", "decode after 32")

HEAD = 49152 * 576
"""Values of SmolLM2's head, which a prompt needs for its last token only."""

WIDTH, ROW, TOP, NAME = 860, 26, 46, 330
BAR = (WIDTH - NAME - 60) // 2
COLOR, OURS = "#7a8794", "#0b63c5"


def table(content: Mapping[str, Any]) -> str:
    """Return all figures as Markdown."""
    found = Limits(**content["limits"])
    systems: Sequence[Mapping[str, Any]] = content["systems"]
    base = systems[0]
    rates = list(base["rates"])
    heads = [*rates, *(f"{count} at once" for count in base["streams"]), "load cold / warm", "RSS"]
    lines = [
        f"{describe(found)}. Medians of {content['rounds']} rounds in turns, tokens a second; in "
        "brackets, the ratio to the first row, round by round. Of the limit: prefill 512 of the "
        "int8 limit, decode after 32 of what reading the weights takes.",
        "",
        "| | MB | " + " | ".join(heads) + " | of the limit: prefill, decode |",
        "| --- " * (len(heads) + 3) + "|",
    ]
    lines += [_row(one, content, found) for one in systems]
    return "\n".join(lines)


def _row(one: Mapping[str, Any], content: Mapping[str, Any], found: Limits) -> str:
    base = content["systems"][0]
    cells = [one["label"], f"{one['bytes'] / 1e6:.0f}"]
    for what, values in one["rates"].items():
        ratio = statistics.median(a / b for a, b in zip(values, base["rates"][what], strict=True))
        cells.append(f"{_speed(statistics.median(values))} (x {ratio:.2f})")
    for rate in one["streams"].values():
        cells.append("-" if rate is None else _speed(rate))
    cells.append(f"{one['load']['cold']:.1f} / {one['load']['warm']:.1f} s")
    cells.append(f"{one['memory']['all'] / 1e6:.0f} MB")
    prefill, decode = shares(one, found, content.get("token_products", PARAMETERS - HEAD))
    cells.append(f"{prefill:.0%}, {decode:.0%}")
    return "| " + " | ".join(cells) + " |"


def _speed(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def shares(
    one: Mapping[str, Any], found: Limits, token_products: int = PARAMETERS - HEAD
) -> tuple[float, float]:
    """Return the shares of the limits that a system reaches: of prefill 512, of decode."""
    prefill = statistics.median(one["rates"]["prefill 512"])
    decode = statistics.median(one["rates"]["decode after 32"])
    return prefill / found.prefill(token_products), decode / found.decode(one["step_bytes"])


def plot(content: Mapping[str, Any]) -> str:
    """Return bars of prefill and decode as an SVG file of its own, for light and dark pages."""
    systems = content["systems"]
    height = TOP + ROW * len(systems) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="13" role="img">',
        "<title>Tokens a second: prefill of 512, decode after 32</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for column, what in enumerate(PLOTTED):
        left = NAME + column * (BAR + 30)
        parts.append(f'<text x="{left}" y="28" font-weight="bold">{what}, tokens/s</text>')
        values = [statistics.median(one["rates"][what]) for one in systems]
        for index, value in enumerate(values):
            y = TOP + ROW * index
            width = (BAR - 50) * value / max(values)
            color = OURS if "our engine" in systems[index]["label"] else COLOR
            parts.append(
                f'<rect x="{left}" y="{y}" width="{width:.1f}" height="17" fill="{color}"/>'
            )
            parts.append(f'<text x="{left + width + 5:.1f}" y="{y + 13}">{value:.0f}</text>')
    for index, one in enumerate(systems):
        y = TOP + ROW * index + 13
        parts.append(
            f'<text x="{NAME - 10}" y="{y}" text-anchor="end">{escape(one["label"])}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def write(content: Mapping[str, Any], docs: Path = DOCS) -> None:
    """Put the table between its marks in performance.md, and the plot beside it."""
    page = docs / "performance.md"
    text = page.read_text("utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n\n{table(content)}\n\n{END}{after}", "utf-8")
    (docs / "assets" / "speed.svg").write_text(plot(content), "utf-8")
