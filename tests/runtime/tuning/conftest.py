"""A folder for caches that only the test has, with a name that not every program can write."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_onnx.runtime.tuning.tuned import Place, require_place
from llama_onnx.targets.package import ModelPackage


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_ONNX_TUNED", "1")
    folder = tmp_path / "Käse 日本"
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(name, str(folder))
    return folder


@pytest.fixture
def opened(package: Path) -> ModelPackage:
    return ModelPackage.open(package)


@pytest.fixture
def place(cache: Path, opened: ModelPackage) -> Place:
    return require_place(opened)
