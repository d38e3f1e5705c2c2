"""The table and the plot of `nox -s bench`, from invented figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.limits import Limits
from benchmarks.systems.report import END, NAME, START, plot, shares, table, write
from benchmarks.systems.systems import SYSTEMS


def system(label: str, speed: float) -> dict[str, Any]:
    whats = ("prefill 64", "prefill 512", "prefill 2048", "decode after 32", "decode after 2048")
    return {
        "name": label,
        "label": label,
        "bytes": 100_000_000,
        "step_bytes": 100_000_000,
        "rates": {what: [speed, 2 * speed, 3 * speed] for what in whats},
        "streams": {"1": speed, "8": None},
        "load": {"cold": 2.0, "warm": 1.0},
        "memory": {"all": 300_000_000, "own": 100_000_000},
    }


@pytest.fixture
def content() -> dict[str, Any]:
    found = Limits("a processor", 2, read=20e9, fp32=100e9, int8=1e12)
    systems = [system("ours & <mine>, our engine", 50), system("theirs", 25)]
    return {"limits": found.to_json(), "rounds": 3, "systems": systems}


def test_ratios_are_those_of_each_round(content: dict[str, Any]) -> None:
    content["systems"][1]["rates"]["prefill 64"] = [50, 50, 50]  # 1, 1/2 and 1/3 of ours
    row = next(line for line in table(content).splitlines() if line.startswith("| theirs"))
    assert row.split(" | ")[2:4] == ["50 (x 0.50)", "50 (x 0.50)"]
    assert "| - |" in row and "2.0 / 1.0 s" in row and "300 MB" in row


def test_shares_of_the_limits(content: dict[str, Any]) -> None:
    found = Limits(**content["limits"])
    prefill, decode = shares(content["systems"][0], found)
    # 100 tokens a second, of 20 GB/s over 0.1 GB; of 1e12 over two for each of 106 million values.
    assert decode == pytest.approx(0.5)
    assert prefill == pytest.approx(100 * 2 * 106_203_456 / 1e12)


def test_the_plot_is_xml_with_a_bar_for_each(content: dict[str, Any]) -> None:
    root = ElementTree.fromstring(plot(content))
    bars = [each for each in root.iter() if each.tag.endswith("rect") and "x" in each.attrib]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert len(widths) == 4 and widths[0] == pytest.approx(2 * widths[1], abs=0.2)


def test_the_page_gets_table_and_plot(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "assets").mkdir()
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{START}\nstale\n{END}\nafter\n", "utf-8")
    write(content, tmp_path)
    text = page.read_text("utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| theirs |" in text and (tmp_path / "assets" / "speed.svg").exists()


def test_every_system_has_its_own_name() -> None:
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS)
    assert SYSTEMS[0].runtime == "engine"


def test_every_name_fits_into_the_plot() -> None:
    """Letters of the plot's font are 7 of its units wide, on the average of such names."""
    assert max(len(system.label) for system in SYSTEMS) * 7 <= NAME
