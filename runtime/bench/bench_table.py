"""The rows of the table that shows measurements, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_onnx.runtime.bench.comparison import name_streams, shown_turns
from llama_onnx.runtime.bench.timings import Spread

if TYPE_CHECKING:
    from llama_onnx.runtime.bench.bench import Bench


@dataclass(frozen=True)
class Row:
    """A figure of one package with its extremes, or of two with their ratio."""

    name: str
    values: tuple[str, ...]
    extent: str


_Cell = tuple[str, str]  # a value and its extremes


def rows(measured: Bench) -> list[Row]:
    """Return the rows; a figure that one of two packages lacks has "-" there."""
    first = dict(_cells(measured))
    if measured.against is None:
        return [Row(name, (value,), extent) for name, (value, extent) in first.items()]
    second = dict(_cells(measured.against))
    ratios = {one.figure: f"{one.ratio.median:.2f}" for one in measured.comparison}
    return [
        Row(
            name,
            tuple(cells[name][0] if name in cells else "-" for cells in (first, second)),
            ratios.get(name, ""),
        )
        for name in dict.fromkeys([*first, *second])
    ]


def remarks(measured: Bench) -> list[str]:
    """Return what a reader must know beside the rows, one sentence each."""
    both = [measured] if measured.against is None else [measured, measured.against]
    left = dict.fromkeys(text for one in both for text in one.left_out)
    return [*measured.notes, *(f"Not measured: {text}" for text in left)]


def _cells(one: Bench) -> Iterator[tuple[str, _Cell]]:
    yield "first token", _spread(one.first_token_seconds, " s", 3)
    yield "prefill", _spread(one.prefill_rate, " tokens/s", 1)
    if one.decode_rate:
        yield "decode", _spread(one.decode_rate, " tokens/s", 1)
    if one.inter_token_seconds:
        yield "token to token, median", (_milliseconds(one.inter_token_seconds.p50), "")
        yield "token to token, p99", (_milliseconds(one.inter_token_seconds.p99), "")
    for row in one.streams:
        name = name_streams(row.streams)
        yield f"decode of {name}", _spread(row.rate, " tokens/s", 1)
        if row.streams > 1:
            yield f"{name} to one", _spread(row.ratio, "", 2)
            yield f"{name}, p99", (_milliseconds(row.inter_token_seconds.p99), "")
    for number in shown_turns(len(one.turns)):
        turn = one.turns[number - 1]
        yield f"first token of turn {number}", _spread(turn.first_token_seconds, " s", 3)
        known = f"{turn.reused_tokens} of {turn.prompt_tokens}"
        yield f"known tokens of turn {number}", (known, "")
    yield from _memory(one)


def _memory(one: Bench) -> Iterator[tuple[str, _Cell]]:
    yield "load (one run)", (f"{one.load_seconds:.2f} s", "")
    if one.resident is not None and one.peak is not None:
        yield "memory after loading", (f"{one.resident / 1e9:.2f} GB", "")
        yield "peak memory", (f"{one.peak / 1e9:.2f} GB", "")
    if one.caches is not None:
        yield "cache of a token", (f"{one.caches.position_bytes / 1e3:,.1f} kB", "")
        yield "caches at most", (f"{one.caches.most_bytes / 1e9:.2f} GB", "")
        yield "kept of earlier texts", (f"{one.caches.kept_bytes / 1e6:,.1f} MB", "")
    if one.streams:
        row = one.streams[-1]
        yield f"caches of {name_streams(row.streams)}", (f"{row.cache_bytes / 1e6:,.1f} MB", "")


def _spread(spread: Spread, unit: str, digits: int) -> _Cell:
    extremes = f"{spread.least:.{digits}f} to {spread.most:.{digits}f}"
    return f"{spread.median:.{digits}f}{unit}", extremes


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
