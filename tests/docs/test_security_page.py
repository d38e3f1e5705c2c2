"""The page on security counts the attacks that the tests try."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.hostile_packages import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def test_the_table_has_the_tests_own_counts() -> None:
    rows = re.findall(r"^\| packages \| (.+?) \| (\d+) \| (\d+) \|$", PAGE.read_text("utf-8"), re.M)
    assert {kind: (int(tried), int(held)) for kind, tried, held in rows} == {
        kind: (len(changes), len(changes)) for kind, changes in KINDS.items()
    }
