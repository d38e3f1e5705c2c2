"""The table, the plot and the choice of rows."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.quality import report
from benchmarks.quality.chart import Point, draw
from benchmarks.quality.processor import processor
from benchmarks.quality.questions import QUESTIONS, Question
from benchmarks.quality.report import beaten, right_answers, table
from benchmarks.quality.rows import BASE, ROWS, choose
from benchmarks.quality.speed import summarize_times


def result(name: str, bits: float, kl: float, **more: Any) -> dict[str, Any]:
    row = ROWS[name]
    figures = {
        "kl": kl,
        "kl_error": 0.01,
        "kl_p99": 1.5,
        "same_top1": 0.625,
        "perplexity_ratio": 1.1,
    }
    content = {
        "name": name,
        "group": row.group,
        "label": row.label,
        "calibration": "",
        "bits": bits,
    }
    answers = [{"right": True, "counts": True}, {"right": True, "counts": False}]
    return content | {"calibration": "", "figures": figures, "answers": answers} | more


def test_a_row_shows_what_was_measured() -> None:
    measured = result("q4_k_m", 6.2712, 0.1004)
    measured["speed"] = {
        part: {"tokens_per_second": 123.4, "ratio": 0.756} for part in ("prefill", "decode")
    }
    last = table([result(BASE, 5.0, 0.5), measured]).splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells == [
        "llama.cpp Q4_K_M",
        "",
        "6.27",
        "0.1004 ± 0.0100",
        "1.50",
        "62.5%",
        "x 1.100",
        "1 of 1",
        "123 (x 0.76)",
        "123 (x 0.76)",
    ]


def test_only_questions_that_the_original_answers_count() -> None:
    answers = [
        {"right": True, "counts": True},
        {"right": False, "counts": True},
        {"right": True, "counts": False},
    ]
    assert right_answers(answers) == "1 of 2"


def test_a_peer_is_beaten_only_by_no_more_bits_and_no_more_kl() -> None:
    ours = [result(BASE, 4.4, 0.3), result("rtn-int8", 6.2, 0.05)]
    peers = [result("q4_0", 5.4, 0.5), result("q4_k_m", 6.1, 0.1), result("q8_0", 8.6, 0.05)]
    found = {peer["name"]: ours and ours["name"] for peer, ours in beaten([*ours, *peers])}
    assert found == {"q4_0": BASE, "q4_k_m": None, "q8_0": "rtn-int8"}


def test_the_plot_puts_more_bits_right_and_more_loss_up() -> None:
    points = [
        Point(4.4, 0.1, "ours", "a"),
        Point(6.4, 0.01, "ours", "b & c"),
        Point(6.4, 0.1, "peer", "d"),
    ]
    root = ElementTree.fromstring(draw(points))
    space = "{http://www.w3.org/2000/svg}"
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter(f"{space}circle")]
    (right, low), (left, high) = circles[:2]  # the smallest loss first
    assert left < right
    assert high < low  # y grows downwards
    assert "b & c" in [text.text for text in root.iter(f"{space}text")]


def test_labels_do_not_cover_each_other() -> None:
    root = ElementTree.fromstring(draw([Point(5, 0.1, "ours", f"row {n}") for n in range(6)]))
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    at = [(float(t.attrib["x"]), float(t.attrib["y"])) for t in texts if "row " in (t.text or "")]
    assert len(at) == 6
    for first, second in combinations(at, 2):  # 11 pixels high, five letters wide
        assert abs(first[1] - second[1]) > 11 or abs(first[0] - second[0]) > 30


@pytest.mark.parametrize(
    ("answer", "right"),
    [("It is PARIS.", True), ("Parisian food", False), ("", False), ("**Paris**", True)],
)
def test_an_answer_holds_the_word(answer: str, right: bool) -> None:
    assert Question("What is the capital of France?", ("Paris",)).holds(answer) is right


def test_rows_are_chosen_by_name_and_by_set() -> None:
    assert [row.name for row in choose(["q4_0", "q4_0"])] == ["q4_0"]
    assert len(choose(["ours"])) + len(choose(["peers"])) == len(choose(["all"])) == len(ROWS)
    assert len({question.text for question in QUESTIONS}) == 10
    with pytest.raises(KeyError):
        choose(["no such row"])


def test_a_ratio_is_the_median_over_rounds_of_base_by_row() -> None:
    times = [((1.0, 2.0), (2.0, 1.0)), ((3.0, 2.0), (3.0, 4.0)), ((1.0, 8.0), (4.0, 2.0))]
    found = summarize_times(times)
    assert found["prefill"]["ratio"] == 0.5
    assert found["prefill"]["ratios"] == [0.25, 1.0]
    assert found["prefill"]["tokens_per_second"] == 512 / 3
    assert found["decode"]["ratio"] == 2.0


def test_the_instruction_set_is_the_best_there_is(tmp_path: Any) -> None:
    file = tmp_path / "cpuinfo"
    lines = ["model name : Some CPU", "cpu family : 26", "model : 2", "flags : sse avx2 avx512f"]
    file.write_text("\n".join(lines))
    assert processor(file) == "Some CPU (family 26, model 2), AVX512 without VNNI"
    file.write_text("\n".join([*lines[:3], "flags : avx2 avx512f avx512_vnni", "", *lines]))
    assert processor(file) == "Some CPU (family 26, model 2), AVX512-VNNI"


@pytest.mark.parametrize(
    ("page", "columns"),
    [(report.PAGE, range(len(report.COLUMNS))), (report.README, report.SHORT_COLUMNS)],
)
def test_pages_have_the_tables_of_the_committed_results(page: Path, columns: Any) -> None:
    results = json.loads(report.RESULTS.read_text("utf-8"))["rows"]
    between = page.read_text("utf-8").split(report.START)[1].split(report.STOP)[0]
    rows = [line for line in between.splitlines() if line.startswith("| ")]
    assert len(rows) > 3
    whole = table(results, columns).splitlines()
    assert set(rows) - set(report.beaten_lines(results).splitlines()) <= set(whole)
    assert report.PLOT.read_text("utf-8") == draw(report.points(results))
