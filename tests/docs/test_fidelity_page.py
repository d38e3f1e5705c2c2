"""The tables of grades and limits in docs/parity.md are those of fidelity.csv."""

from __future__ import annotations

import math
import re
from pathlib import Path

from llama_onnx.runtime.measure.fidelity import METRICS, Row, grades, limits_of, recipes

PAGE = (Path(__file__).parents[2] / "docs" / "parity.md").read_text("utf-8")
SECTION = PAGE.partition("## Two verdicts\n")[2].partition("\n## ")[0]


def number(text: str) -> float:
    text = text.strip()
    if not text:
        return math.inf
    return round(float(text.rstrip("%")) / 100, 6) if text.endswith("%") else float(text)


def rows(heading: str) -> list[list[str]]:
    lines = SECTION.partition(heading)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def most(row: Row | None) -> list[float]:
    assert row
    return [getattr(row, metric) for metric in METRICS]


def test_the_page_has_every_grade() -> None:
    found = [(name, [*map(number, cells)], said) for name, *cells, said in rows("| Grade |")]
    assert [("| Grade |" in SECTION, len(found))] == [(True, len(grades()))]
    assert found == [(row.name, most(row), row.reason) for row in grades()]


def test_the_page_has_the_limits_of_every_recipe() -> None:
    found = {name: [re.split(";", c) for c in cells] for name, *cells in rows("| Recipe |")}
    assert found.keys() == recipes()
    for name, sizes in found.items():
        for cells, parameters in zip(sizes, (1, 3_000_000_000), strict=True):
            assert [*map(number, cells)] == most(limits_of(name, parameters)), name
