"""What the workers of a parallel run share, made by the first that asks for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this run, the same in all of its workers."""
    own = factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"


def make_once(place: Path, make: Callable[[Path], object]) -> Path:
    """Return `place` after `make` made it, here or in another worker; the others wait."""
    done = place.with_name(place.name + ".done")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(place.name + ".lock")):
        if not done.exists():
            make(place)
            done.touch()
    return place
