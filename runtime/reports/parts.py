"""The parts that a report's page is made of, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from llama_onnx.runtime.reports.svg import Series


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
    """Text first, then tables, then figures."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
