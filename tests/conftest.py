"""Tiny packages, made once a run by the real exporter, for all of its workers."""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support.disk import skip_flushes
from tests.support.once import make_once, shared_folder
from tests.support.threads import limit_threads

if TYPE_CHECKING:
    from llama_onnx.runtime.llama.model import Llama
    from tests.support.parity import Make


LIMIT = pytest.StashKey[pytest.MonkeyPatch]()
QUICK = pytest.StashKey[pytest.MonkeyPatch]()

# How long an example takes says something about the machine, nothing about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    patch = pytest.MonkeyPatch()
    limit_threads(patch)
    patch.setenv("LLAMA_ONNX_TUNED", "0")  # whoever runs the tests may have tuned packages
    config.stash[LIMIT] = patch
    config.stash[QUICK] = pytest.MonkeyPatch()
    skip_flushes(config.stash[QUICK])


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[LIMIT].undo()
    config.stash[QUICK].undo()


def pytest_collection(session: pytest.Session) -> None:
    """Imports make hundreds of thousands of objects that stay: no search for garbage meanwhile."""
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    if "onnx_ir" in sys.modules:  # which some sessions do not have
        from tests.support.signatures import remember_signatures

        remember_signatures(session.config.stash[QUICK])
    # Nor later among what was imported; and tests make many objects that only look like garbage.
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


@pytest.fixture
def default_threads(pytestconfig: pytest.Config) -> Iterator[None]:
    """The number of threads that a session takes outside the tests."""
    pytestconfig.stash[LIMIT].undo()
    yield
    limit_threads(pytestconfig.stash[LIMIT])


def _package(factory: pytest.TempPathFactory, precision: str) -> Path:
    from tests.support.packages import make_package

    place = shared_folder(factory) / precision
    return make_once(place, lambda folder: make_package(folder, precision)) / f"tiny-{precision}"


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int4 package. Read only: alter a copy of it."""
    return _package(tmp_path_factory, "int4")


@pytest.fixture(scope="session")
def package_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in fp32. Read only."""
    return _package(tmp_path_factory, "fp32")


@pytest.fixture(scope="session")
def package_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with weights in fp16, computed in fp32. Read only."""
    return _package(tmp_path_factory, "fp16")


@pytest.fixture(scope="session")
def llama(package: Path) -> Llama:
    """The int4 package, opened."""
    # Not at the top: some tests run where there is no onnxruntime-genai.
    from llama_onnx.runtime.llama.model import Llama

    return Llama.load(package)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Package and source of one of `tests.support.parity.EXPORTS`, made once. Read only."""
    from tests.support.parity import maker

    return maker(shared_folder(tmp_path_factory) / "parity")


@pytest.fixture
def copied(made: Make, tmp_path: Path) -> Make:
    """The same, but the package may be damaged."""

    def copy(name: str) -> tuple[Path, Path]:
        package, source = made(name)
        return Path(shutil.copytree(package, tmp_path / name)), source

    return copy
