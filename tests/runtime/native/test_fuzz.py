"""A short run of `nox -s fuzz_native`: the readers of the C library, under sanitizers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.fuzz.native import fuzz

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="built with gcc for Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]


@pytest.mark.slow
def test_changed_inputs_are_read_within_their_bounds(tmp_path: Path) -> None:
    assert int(fuzz(tmp_path, 2, seed=1).split()[0]) > 10
