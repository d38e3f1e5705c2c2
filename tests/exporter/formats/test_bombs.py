"""Files that promise much are refused before it is allocated: seconds and memory are measured."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ACCEPTED = {"15 MB of text"}
"""A large value of a key that the format's reader does not look at."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what became of every bomb, read one after the other by one process."""
    command = [sys.executable, "-m", "tests.support.bombs", str(tmp_path_factory.mktemp("bombs"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_bomb_is_refused_in_one_sentence(outcomes: list[dict[str, Any]]) -> None:
    assert len(outcomes) > 70
    for found in outcomes:
        if found["name"] in ACCEPTED:
            assert found["outcome"] == "accepted"
        else:
            assert "bomb." in found["outcome"], found
            assert found["outcome"].endswith("."), found
            assert "\n" not in found["outcome"], found


def test_no_bomb_takes_long_or_much_memory(outcomes: list[dict[str, Any]]) -> None:
    assert max(found["seconds"] for found in outcomes) < 10
    if sys.platform != "win32":
        assert max(found["bytes"] for found in outcomes) < 1 << 30
