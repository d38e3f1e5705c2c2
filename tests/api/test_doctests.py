"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import llama_onnx

ROOT = Path(__file__).parents[2]
HOUSES = {
    "api": "llama_onnx",
    "exporter": "llama_onnx.exporter",
    "runtime": "llama_onnx.runtime",
    "targets": "llama_onnx.targets",
}
"""Folder -> what it is imported as."""

NO_MODULES = ("templates", "samples")
"""Folders of files that run elsewhere."""

FUNCTIONS = ("export", "open_package", "plan", "validate", "verify")


def modules() -> list[str]:
    """Names of the modules with examples."""
    names = [
        ".".join([HOUSES[house], *path.relative_to(ROOT / house).with_suffix("").parts])
        for house in HOUSES
        for path in sorted((ROOT / house).rglob("*.py"))
        if not set(NO_MODULES) & set(path.parts) and ">>> " in path.read_text(encoding="utf-8")
    ]
    return [name.removesuffix(".__init__") for name in names]


def examples_of(module: ModuleType) -> list[doctest.DocTest]:
    globs = {**vars(module), "llama_onnx": llama_onnx}
    return [test for test in doctest.DocTestFinder().find(module, globs=globs) if test.examples]


def run(test: doctest.DocTest) -> str:
    """Return what went wrong; empty if nothing did."""
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    return "".join(said)


@pytest.fixture
def examples(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with the checkpoint and the package that the examples use."""
    shutil.copytree(package.parent / "checkpoint", tmp_path / "tiny-llama")
    shutil.copytree(package, tmp_path / "tiny-int4")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", modules())
@pytest.mark.usefixtures("examples")
def test_the_examples_of_a_module(name: str) -> None:
    module = importlib.import_module(name)
    tests = examples_of(module)
    assert tests, "the examples are where doctest does not look"
    assert "".join(map(run, tests)) == ""


def test_every_public_function_and_class_has_an_example() -> None:
    found = {test.name for test in examples_of(llama_onnx)}
    assert found == {f"llama_onnx.{name}" for name in FUNCTIONS}
    public = {name for name in llama_onnx.__all__ if name.islower() and "__" not in name}
    assert public == set(FUNCTIONS)
    module = importlib.import_module(llama_onnx.Llama.__module__)
    assert [test for test in examples_of(module) if test.name.endswith(".Llama")]


def test_a_wrong_example_is_seen() -> None:
    module = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert "Expected:\n    3\nGot:\n    2" in run(examples_of(module)[0])
