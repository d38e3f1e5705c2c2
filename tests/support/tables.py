"""Tables of tested cases, printed and written into the documentation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One line of a table: what was tested, whether it holds, and the result as text."""

    what: str
    holds: bool
    said: str


Table = tuple[str, Sequence[Case]]
"""The header, in Markdown, and the lines."""


def markdown(header: str, cases: Sequence[Case]) -> str:
    """Return a table with one more column than `header`, for whether each line holds."""
    columns = header.count("|") + 1
    lines = [f"| {header} | holds |", "| --- " * columns + "| --- |"]
    for case in cases:
        said = case.said.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {case.what} | {said} | {'yes' if case.holds else 'NO'} |")
    return "\n".join(lines)


def write_docs(docs: Path, name: str, text: str) -> None:
    """Write `text` between the markers of the part `name` in `docs`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    content = docs.read_text("utf-8")
    before, found, rest = content.partition(begin)
    if not found or end not in rest:
        sys.exit(f"{docs} has no part '{name}' to put the table into.")
    docs.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}", "utf-8")


def show(docs: Path, name: str, tables: Sequence[Table], private: Sequence[str] = ()) -> bool:
    """Print `tables` and write them to the part `name` of `docs`, without the paths in `private`;
    return whether every line holds."""
    text = "\n\n".join(markdown(header, cases) for header, cases in tables)
    for folder in private:
        text = text.replace(folder, "…")
    print(text, flush=True)
    write_docs(docs, name, text)
    return all(case.holds for _, cases in tables for case in cases)
