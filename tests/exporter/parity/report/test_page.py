"""The report as a page: everything on it, nothing of a package's own can become markup."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.parity.measure.about import describe
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.report import LayerError, ParityReport
from llama_onnx.exporter.parity.measure.weights import WeightError, Worst
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.parity.report.page import render
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.situations import SITUATIONS
from llama_onnx.runtime.reports.svg import FLOOR, Series, histogram, log_chart
from llama_onnx.targets.cpu import TARGET
from tests.support import tiny

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "br", "hr", "img", "input", "link"}
TAGS = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "h1",
    "h2", "p", "div", "strong", "dl", "dt", "dd", "code", "table", "caption", "thead", "tbody",
    "tr", "th", "td", "figure", "figcaption", "b", "ul", "li",
    "svg", "text", "line", "polyline", "circle", "rect",
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.names: list[str | None] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "svg":
            values = dict(attrs)
            assert values.get("aria-hidden") == "true" or values["role"] == "img"
            self.names.append(values.get("aria-label"))
        # A parser for HTML does not know that these close themselves inside an SVG.
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def report(package: Path) -> ParityReport:
    return prove(package, open_checkpoint(package.parent / "checkpoint"), tokens=8, longest=24)


def test_the_verdict_comes_first_and_everything_is_there(report: ParityReport) -> None:
    text = Page(render(report)).text
    assert text.index("Passed") < text.index("Errors by situation")
    for situation in SITUATIONS:
        assert situation.meaning in text
    for check in report.checks:
        assert check.threshold.reason in text
    for file in report.about.files:
        assert file.sha256 in text
    for name, version in report.about.versions.items():
        assert name in text and version in text
    assert report.about.machine in text
    parted = next(d for one in report.greedy for d in one.divergences if d)
    assert f"({parted.chosen})" in text and f"({parted.expected})" in text
    assert f"{report.measurements[-1].figures.mean_kl:.2e}" in text


def test_the_page_asks_the_network_for_nothing_and_runs_nothing(report: ParityReport) -> None:
    page = Page(render(report))
    assert set(page.tags) <= TAGS
    names = {name for _, name, _ in page.attributes}
    assert not names & {"href", "src", "srcset", "data", "action", "style", "xlink:href"}
    assert not any(name.startswith("on") for name in names)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r"https?://|url\(|@import", render(report))


def test_charts_and_tables_have_names_and_scroll_by_themselves(report: ParityReport) -> None:
    page = Page(render(report))
    charts = [name for name in page.names if name]
    assert len(charts) > 10
    assert page.tags.count("table") == page.tags.count("caption")
    scrolling = [a for a in page.attributes if a == ("div", "class", "scroll")]
    assert len(scrolling) == page.tags.count("table")


def test_a_hostile_name_stays_text(report: ParityReport) -> None:
    hostile = replace(
        report,
        package=f"/models/{HOSTILE}",
        original=HOSTILE,
        weights=WeightError(Worst(1.0, HOSTILE), block_rms=Worst(1.0, HOSTILE)),
        about=replace(
            report.about,
            machine=HOSTILE,
            versions={HOSTILE: HOSTILE},
            parts={HOSTILE: 1},
            files=(replace(report.about.files[0], name=HOSTILE),),
            pieces=dict.fromkeys(range(300), HOSTILE),
        ),
        layers=tuple(LayerError(HOSTILE, 1e-7, 1e-2) for _ in report.layers),
    )
    page = Page(render(hostile))
    assert set(page.tags) <= TAGS
    assert page.text.count(HOSTILE) >= 7
    assert {name for _, name, _ in page.attributes} == {
        name for _, name, _ in Page(render(report)).attributes
    }


def test_a_missed_limit_is_named_with_its_situations(report: ParityReport) -> None:
    row = next(c for c in report.checks if c.threshold.measure == "graph")
    failed = replace(report, checks=(replace(row, situation="decode", value=math.nan),))
    text = Page(render(failed)).text
    name = f"{row.threshold.measure.capitalize()} {row.threshold.metric} (decode) beyond the limit"
    assert "Failed" in text and name in text
    assert "missed (decode)" in text and "✗" in text


def test_figures_that_are_no_numbers_are_said_and_break_nothing(report: ParityReport) -> None:
    broken = replace(
        report,
        layers=tuple(replace(layer, graph=math.nan) for layer in report.layers),
        curves=tuple(
            replace(c, kl=(math.nan,) * len(c.kl), relative_l2=(math.inf,) * len(c.kl))
            for c in report.curves
        ),
    )
    page = Page(render(broken))
    assert f"{len(report.layers)} values are NaN" in page.text
    drawn = [v for tag, name, v in page.attributes if tag in ("polyline", "circle", "rect")]
    assert not any("nan" in (value or "") or "inf" in (value or "") for value in drawn)


def test_hashes_are_of_the_files_as_they_are(package: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(package, tmp_path / "verändert 日本"))
    with (altered / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write(" ")
    reference = open_checkpoint(package.parent / "checkpoint")
    about = prove(altered, reference, tokens=2, longest=8).about
    template = next(file for file in about.files if file.name == "chat_template.jinja")
    content = (altered / "chat_template.jinja").read_bytes()
    assert template.sha256 == hashlib.sha256(content).hexdigest()
    assert template.as_made is False
    assert about.altered == ("chat_template.jinja",)
    assert sum(about.parts.values()) == sum(p.stat().st_size for p in altered.rglob("*"))


def test_tokens_are_named_by_what_they_read_as(package: Path) -> None:
    ids = Tokenizer.from_file(str(package / "tokenizer.json")).encode(" the fox\n").ids
    subject = open_subject(package, open_checkpoint(package.parent / "checkpoint"))
    pieces = describe(subject, ids).pieces
    assert "".join(pieces[token] for token in ids) == " the fox\n"
    assert describe(subject, [10**6]).pieces == {}


def test_bits_a_weight_are_those_that_the_export_foretold(tmp_path: Path) -> None:
    """Of a tied model too, whose head the package reads from the embedding's bytes."""
    config = replace(tiny.GQA, tie_word_embeddings=True)
    source = tiny.write_huggingface(tmp_path / "source", config)
    result = export_package(source, tmp_path / "package", TARGET, Options("int8"))
    about = prove(result.package, open_checkpoint(source), tokens=2, longest=8).about
    assert about.bits_per_weight == pytest.approx(result.plan.bits_per_weight)


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["validate", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_writes_it_beside_the_json(package: Path, tmp_path: Path) -> None:
    here = Path(shutil.copytree(package, tmp_path / "Modell ä <b>日本"))
    page = tmp_path / "Bericht ä 日本.html"
    settings = ("--tokens", 4, "--prompt-tokens", 16)
    checkpoint = package.parent / "checkpoint"
    code, output = run(here, "--reference", checkpoint, *settings, "--report", page, "--json")
    assert code == 0
    content = json.loads(output)
    text = Page(page.read_text(encoding="utf-8")).text
    assert "Parity of Modell ä <b>日本 with its original" in text
    assert f"{content['measurements'][0]['figures']['max_abs']:.1e}" in text
    assert content["speed"]["prompt_tokens"] == 16
    assert content["about"]["versions"]["onnxruntime"]
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(
    package: Path, tmp_path: Path
) -> None:
    page = tmp_path / "nowhere" / "report.html"
    code, output = run(package, "--reference", package.parent / "checkpoint", "--report", page)
    assert code == 2
    assert "is not a folder: create it first." in output


POINTS = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60)


@given(first=POINTS, second=POINTS)
def test_any_values_make_a_chart_whose_points_lie_inside(
    first: list[float], second: list[float]
) -> None:
    series = [
        Series("a", "first", list(enumerate(first))),
        Series("b", "second", list(enumerate(second))),
    ]
    svg = str(log_chart(series, title="t", x_label="x", y_label="y"))
    Page(svg)
    drawn = [p for points in re.findall(r'points="([^"]*)"', svg) for p in points.split()]
    finite = sum(math.isfinite(value) for value in first + second)
    assert len(drawn) == finite
    assert all(
        0 <= float(p.split(",")[0]) <= 420 and 0 <= float(p.split(",")[1]) <= 250 for p in drawn
    )
    bars = str(histogram(series, title="t", x_label="x"))
    Page(bars)
    heights = [float(h) for h in re.findall(r'class="bar[^>]*height="([^"]*)"', bars)]
    assert all(0 <= height <= 250 for height in heights)


def test_a_chart_is_logarithmic() -> None:
    points = [(0.0, 1e-6), (1.0, 1e-4), (2.0, 1e-2), (3.0, 0.0)]
    svg = str(log_chart([Series("a", "first", points)], title="", x_label="", y_label=""))
    (found,) = re.findall(r'points="([^"]*)"', svg)
    heights = [float(p.split(",")[1]) for p in found.split()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert heights[3] > heights[0]  # zero lies at the bottom, where FLOOR is
    assert math.log10(FLOOR) == -9
