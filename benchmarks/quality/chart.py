"""KL against bits as an SVG file of its own, readable on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 52
LINE = 13  # pixels
DOWN = (0, -9, 9, -16, 16, -24, 24, -34, 34, -44, 44)
"""How far below its mark's height a name may be, the best first."""
LETTER = 6.3  # about the width of one

COLORS = ("#0b63c5", "#c4570a", "#2e7d32", "#7b3fa0", "#555555")
_Box = tuple[float, float, float, float]  # left, top, right, bottom

MARKS = ("circle", "square", "diamond", "triangle", "cross")


@dataclass(frozen=True)
class Point:
    """One model: bits a parameter, mean KL, the group it belongs to, and its short name."""

    bits: float
    kl: float
    group: str
    label: str


@dataclass(frozen=True)
class _Axes:
    bits: tuple[float, float]
    decades: tuple[float, float]

    def x(self, bits: float) -> float:
        low, high = self.bits
        return LEFT + (bits - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, kl: float) -> float:
        low, high = self.decades
        return TOP + (high - math.log10(kl)) / (high - low) * (HEIGHT - TOP - BOTTOM)


def draw(points: Sequence[Point]) -> str:
    """Return the plot; the first group's points are joined where none has less of both."""
    axes = _axes(points)
    groups = list(dict.fromkeys(point.group for point in points))
    parts = [*_grid(axes), *_frontier([p for p in points if p.group == groups[0]], axes)]
    marks = [(axes.x(point.bits), axes.y(point.kl)) for point in points]
    taken: list[_Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    for point in sorted(points, key=lambda one: one.kl):
        index = groups.index(point.group)
        x, y = axes.x(point.bits), axes.y(point.kl)
        parts.append(_mark(MARKS[index], COLORS[index], x, y))
        parts.append(_label(point, COLORS[index], x, y, taken, bold=index == 0))
    for index, group in enumerate(groups):
        y = TOP + 18 + 18 * index
        parts.append(_mark(MARKS[index], COLORS[index], WIDTH - RIGHT - 130, y))
        parts.append(_text(WIDTH - RIGHT - 118, y + 4, group, COLORS[index]))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="11">\n<title>Mean KL to the original against bits '
        f'a parameter</title>\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n'
        "</svg>\n"
    )


def _axes(points: Sequence[Point]) -> _Axes:
    bits = [point.bits for point in points]
    logs = [math.log10(point.kl) for point in points]
    low, high = math.floor(2 * min(bits)) / 2, math.ceil(2 * max(bits)) / 2
    return _Axes((low - 0.1, high + 0.7), (min(logs) - 0.08, max(logs) + 0.08))


def _grid(axes: _Axes) -> list[str]:
    parts = []
    low, high = axes.decades
    for decade in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 2, 5):
            value = factor * 10.0**decade
            if low <= math.log10(value) <= high:
                y = axes.y(value)
                parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "#dddddd"))
                parts.append(_text(LEFT - 8, y + 4, f"{value:g}", "#444444", "end"))
    for half in range(math.ceil(2 * axes.bits[0]), math.floor(2 * axes.bits[1]) + 1):
        x = axes.x(half / 2)
        parts.append(_line(x, TOP, x, HEIGHT - BOTTOM, "#eeeeee"))
        parts.append(_text(x, HEIGHT - BOTTOM + 18, f"{half / 2:g}", "#444444", "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 14, "bits a parameter (whole file)", "#222222", "middle"))
    parts.append(
        f'<text transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
        'text-anchor="middle" fill="#222222">mean KL to the original, nats (log)</text>'
    )
    return parts


def _frontier(points: Sequence[Point], axes: _Axes) -> list[str]:
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.bits, one.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    path = " ".join(f"{axes.x(p.bits):.1f},{axes.y(p.kl):.1f}" for p in best)
    line = f'<polyline points="{path}" fill="none" stroke="{COLORS[0]}" stroke-dasharray="4 3"/>'
    return [line] if len(best) > 1 else []


def _label(point: Point, color: str, x: float, y: float, taken: list[_Box], *, bold: bool) -> str:
    """Write the name beside the mark, where it is clear of other marks and names."""
    width = LETTER * len(point.label) * (1.08 if bold else 1)
    places = [(8, start, 4 + down) for down in DOWN for start in (0.0, -width - 16)]
    boxes = [
        (x + right + start, y + down - LINE + 3, x + right + start + width, y + down + 3)
        for right, start, down in places
    ]
    box = next((one for one in boxes if _free(one, taken)), boxes[0])
    taken.append(box)
    return _text(box[0], box[3] - 3, point.label, color, bold=bold)


def _free(box: _Box, taken: Sequence[_Box]) -> bool:
    if box[0] < LEFT or box[2] > WIDTH:
        return False
    return not any(
        box[0] < right and left < box[2] and box[1] < below and above < box[3]
        for left, above, right, below in taken
    )


def _mark(kind: str, color: str, x: float, y: float) -> str:
    shapes = {
        "square": "-4,-4 4,-4 4,4 -4,4",
        "diamond": "0,-5 5,0 0,5 -5,0",
        "triangle": "0,-5 5,4 -5,4",
        "cross": "-5,-1 -1,-1 -1,-5 1,-5 1,-1 5,-1 5,1 1,1 1,5 -1,5 -1,1 -5,1",
    }
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
    return (
        f'<polygon transform="translate({x:.1f} {y:.1f})" points="{shapes[kind]}" fill="{color}"/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(
    x: float, y: float, text: str, color: str, anchor: str = "start", *, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )
