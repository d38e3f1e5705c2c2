"""The built C library, and models opened with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_onnx.targets.bundle import write_sums
from tests.support.native import build_library, load_sample


@pytest.fixture(scope="package")
def sample() -> Any:
    """The Python sample, as a module."""
    return load_sample()


@pytest.fixture(scope="package")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `bin` of a bundle for Linux."""
    return build_library(tmp_path_factory.mktemp("native") / "bin ä ü 日本").parent


@pytest.fixture
def model(sample: Any, built: Path, package: Path) -> Iterator[Any]:
    """The int4 package, opened in C."""
    with sample.Model(package, library=built / "libllama_onnx.so") as opened:
        yield opened


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """A copy of the int4 package with its SHA256SUMS, in a folder with an awkward name."""
    out = Path(shutil.copytree(package, tmp_path / "ä ü 日本"))
    write_sums(out)
    return out
