"""`bench --report`: a page with plots, and files that cannot be written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.runtime.bench import bench as bench_module
from llama_onnx.runtime.bench.bench import Bench, bench
from llama_onnx.runtime.bench.bench_page import render
from llama_onnx.runtime.reports.svg import Series, line_chart

HOSTILE = "<script>alert(1)</script>\"'&amp;"


class Text(HTMLParser):
    """The tags and the text of a page, without its style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text += data


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def measured(package: Path) -> Bench:
    sizes: dict[str, Any] = {"new_tokens": 6, "repeats": 2, "turns": 3, "streams": (2, 4)}
    return bench(package, engine="onnxruntime", threads=1, **sizes)


def polylines(page: str) -> list[int]:
    """The number of points of each line."""
    return [len(points.split()) for points in re.findall(r'<polyline[^>]*points="([^"]*)"', page)]


def test_a_page_has_the_figures_of_the_json(package: Path, tmp_path: Path) -> None:
    sizes = ("--new-tokens", "6", "--repeats", "2", "--turns", "3", "--streams", "1,2")
    page = tmp_path / "page.html"
    options = ("--engine", "onnxruntime", "--threads", "1", "--report", page, "--json")
    result = run(package, *sizes, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    found, text = json.loads(result.stdout), Text(page.read_text(encoding="utf-8"))
    assert f"{found['prefill_rate']['median']:.1f} tokens/s" in text.text
    assert f"{found['streams'][1]['rate']['median']:.1f} tokens/s" in text.text
    assert package.name in text.text
    assert polylines(page.read_text(encoding="utf-8")) == [2, 3, 100]  # streams, turns, percent
    assert not re.search(r"https?://|url\(|@import", page.read_text(encoding="utf-8"))
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_two_packages_have_two_lines_and_sentences(measured: Bench) -> None:
    other = replace(measured, package="elsewhere/other", streams=())
    page = render(replace(measured, against=other, comparison=()))
    assert polylines(page) == [3, 3, 3, 100, 100]
    assert "other" in Text(page).text


def test_a_hostile_name_stays_text(measured: Bench) -> None:
    hostile = replace(measured, package=f"x/{HOSTILE.replace('/', '')}", processor=HOSTILE)
    page = Text(render(hostile))
    assert "script" not in page.tags
    assert HOSTILE in page.text


def test_one_token_has_a_page_too(measured: Bench) -> None:
    runs = replace(
        measured.runs, single=tuple(replace(r, step_seconds=(1.0,)) for r in measured.runs.single)
    )
    bare = replace(
        measured, decode_rate=None, inter_token_seconds=None, streams=(), turns=(), runs=runs
    )
    assert polylines(render(bare)) == []


def test_a_line_chart_is_linear_from_zero() -> None:
    points = [(0.0, 0.0), (1.0, 5.0), (2.0, 10.0), (3.0, float("nan"))]
    svg = str(line_chart([Series("a", "first", points)], title="", x_label="", y_label=""))
    (found,) = re.findall(r'<polyline[^>]*points="([^"]*)"', svg)
    heights = [float(point.split(",")[1]) for point in found.split()]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[0] == 206  # where 0 is written
    assert re.findall(r'y="210.0">([^<]*)<', svg) == ["0"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere/page.html", "is not a folder: create it first"),
        ("folder.html", "choose another file for the report"),
        ("page.png", "must end in .html"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_first(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("opened something")

    monkeypatch.setattr(bench_module, "Here", never)
    (tmp_path / "folder.html").mkdir()
    result = run(package, "--report", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
