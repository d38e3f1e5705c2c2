"""Inputs on which a reader once failed are refused or accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fuzz.run import replay, seeds

KEPT = list(seeds())


@pytest.mark.parametrize(("reader", "name", "files"), KEPT, ids=[f"{r}-{n}" for r, n, _ in KEPT])
def test_a_kept_input(reader: str, name: str, files: dict[str, bytes], tmp_path: Path) -> None:
    assert files, name
    assert replay(reader, files, tmp_path) in ("refused", "accepted")
