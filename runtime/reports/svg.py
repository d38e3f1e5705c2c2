"""Charts as inline SVG, drawn by hand: line charts, a histogram, bars.

Colors are classes of the page's style sheet, so that charts follow its light and dark theme; two
series differ in color, dash and marker. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

FLOOR = 1e-9
"""Smaller values and zero are drawn at the bottom: below it there is only rounding."""

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 10, 44
_MARKED = 40  # most points of a line that gets a marker at each

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Series:
    """Points (x, y) joined by one line; `style` is "first", "second" or "limit"."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Scale:
    """Maps `low` to `start` and `high` to `stop`, in user units of the drawing."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.stop - self.start)


def log_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
    marks: Iterable[tuple[float, str]] = (),
) -> Markup:
    """Draw lines over a linear x axis and a logarithmic y axis.

    `x_names` name the points 0, 1, 2, ...; `marks` are vertical lines (x, name).
    """
    values = [y for one in series for _, y in one.points if math.isfinite(y)]
    low, high = _decades(values)
    ends = [x for one in series for x, _ in one.points] or [0.0]
    x = _Scale(min(ends), max(ends), _LEFT + 6, _WIDTH - _RIGHT)
    y = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x_label, y_label), *_decade_lines(y), *_x_ticks(x, x_names)]
    for position, name in marks:
        parts.append(_vertical(x(position), name))
    for one in series:
        parts += _line(_heights(one), x, y)
    return _svg(title, parts)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] | None = None,
) -> Markup:
    """Draw lines over two linear axes, the vertical one from zero; values are not negative.

    `x_names` name the points 0, 1, 2, ...
    """
    points = [(x, y) for one in series for x, y in one.points if math.isfinite(y)]
    ends = [x for x, _ in points] or [0.0]
    x = _Scale(min(ends), max(ends), _LEFT + 6, _WIDTH - _RIGHT)
    tallest = max((y for _, y in points), default=0.0) or 1.0
    y = _Scale(0, tallest, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x_label, y_label), *_value_lines(y), *_x_ticks(x, x_names)]
    for one in series:
        parts += _line(one, x, y)
    return _svg(title, parts)


def histogram(series: Sequence[Series], *, title: str, x_label: str) -> Markup:
    """Draw the share of values in each half decade, with the bars of two series side by side.

    The points' x is ignored.
    """
    finite = [[v for _, v in one.points if math.isfinite(v)] for one in series]
    low, high = _decades([v for values in finite for v in values])
    bins = 2 * (high - low)
    shares = [_shares(values, low, bins) for values in finite]
    tallest = max((share for one in shares for share in one), default=0) or 1.0
    x = _Scale(0, bins, _LEFT + 6, _WIDTH - _RIGHT)
    y = _Scale(0, tallest, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(x_label, "share of positions"), *_percent_lines(y)]
    step = max(1, (high - low) // 5)
    for decade in range(low, high + 1, step):
        parts.append(_tick(x(2 * (decade - low)), _power(decade)))
    width = (x(1) - x(0)) * 0.9 / max(1, len(series))
    for number, (one, counted) in enumerate(zip(series, shares, strict=True)):
        for index, share in enumerate(counted):
            if not share:
                continue
            left = x(index) + number * width
            height = y(0) - y(share)
            parts.append(
                Markup(
                    '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
                ).format(f"bar {one.style}", left, y(share), width, height)
            )
    return _svg(title, parts)


def strip(share: float, title: str) -> Markup:
    """Draw a bar filled to `share` (0 to 1)."""
    return Markup(
        '<svg class="strip" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        'aria-label="{}"><rect class="track" width="100" height="8"/>'
        '<rect class="bar first" width="{:.1f}" height="8"/></svg>'
    ).format(title, 100 * share)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Return the exponents of the powers of ten around `values`, at least one decade apart."""
    seen = [max(value, FLOOR) for value in values] or [FLOOR]
    low, high = math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)))
    return low, max(high, low + 1)


def _height(value: float) -> float:
    return math.log10(max(value, FLOOR))


def _heights(one: Series) -> Series:
    """Return the points on a logarithmic axis."""
    points = [(x, _height(y) if math.isfinite(y) else y) for x, y in one.points]
    return Series(one.label, one.style, points)


def _shares(values: Sequence[float], low: int, bins: int) -> list[float]:
    counts = [0.0] * bins
    for value in values:
        counts[min(bins - 1, int(2 * (_height(value) - low)))] += 1
    return [count / len(values) for count in counts] if values else counts


def _line(one: Series, x: _Scale, y: _Scale) -> Iterator[Markup]:
    points = [(x(a), y(b)) for a, b in one.points if math.isfinite(b)]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    yield Markup('<polyline class="line {}" points="{}"/>').format(one.style, path)
    if one.style == "limit" or len(points) > _MARKED:
        return
    for a, b in points:
        if one.style == "first":
            yield Markup('<circle class="dot first" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(a, b)
        else:
            yield Markup(
                '<rect class="dot {}" x="{:.1f}" y="{:.1f}" width="5" height="5"/>'
            ).format(one.style, a - 2.5, b - 2.5)


def _decade_lines(y: _Scale) -> Iterator[Markup]:
    step = max(1, math.ceil((y.high - y.low) / 6))
    for decade in range(int(y.low), int(y.high) + 1, step):
        yield _horizontal(y(decade), _power(decade))


def _percent_lines(y: _Scale) -> Iterator[Markup]:
    step = next((s for s in (0.05, 0.1, 0.2, 0.25) if y.high / s <= 5), 0.25)
    for index in range(int(y.high / step + 1e-9) + 1):
        yield _horizontal(y(index * step), f"{index * step:.0%}")


def _value_lines(y: _Scale) -> Iterator[Markup]:
    step = 10.0 ** math.floor(math.log10(y.high))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if y.high / s <= 5.5)
    for index in range(int(y.high / step + 1e-9) + 1):
        yield _horizontal(y(index * step), f"{index * step:,.6g}")


def _x_ticks(x: _Scale, names: Sequence[str] | None) -> Iterator[Markup]:
    if names is not None:
        step = max(1, math.ceil(len(names) / 8))
        shown = [*range(0, len(names) - step, step), len(names) - 1]
        yield from (_tick(x(index), names[index]) for index in shown)
        return
    step = next(s for s in _round_steps() if (x.high - x.low) / s <= 6)
    for value in range(math.ceil(x.low / step) * step, int(x.high) + 1, step):
        yield _tick(x(value), f"{value:,}")


def _round_steps() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _horizontal(at: float, label: str) -> Markup:
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<text class="tick end" x="{}" y="{:.1f}">{}</text>'
    ).format(_LEFT, _WIDTH - _RIGHT, at, at, _LEFT - 5, at + 4, label)


def _vertical(at: float, name: str) -> Markup:
    return Markup(
        '<line class="mark" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
        '<text class="tick end" x="{:.1f}" y="{}">{}</text>'
    ).format(at, at, _TOP, _HEIGHT - _BOTTOM, at - 4, _TOP + 10, name)


def _tick(at: float, label: str) -> Markup:
    return Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(
        at, _HEIGHT - _BOTTOM + 16, label
    )


def _frame(x_label: str, y_label: str) -> Markup:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return Markup(
        '<text class="axis middle" x="{}" y="{}">{}</text>'
        '<text class="axis middle" transform="translate(12 {}) rotate(-90)">{}</text>'
    ).format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, middle, y_label)


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}" if exponent else "1"


def _svg(title: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, title, Markup("").join(escape(part) for part in parts)
    )
