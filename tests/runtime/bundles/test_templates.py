"""Templates: Python that runs elsewhere, with names that have to exist here."""

from __future__ import annotations

import ast
import glob
import importlib
from pathlib import Path

import pytest

from llama_onnx.runtime.bundles.template_files import TEMPLATES

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(TEMPLATES.glob("*/*.py.template"))


def test_there_are_scripts_and_none_is_a_module_here() -> None:
    assert [path.name for path in SCRIPTS] == [
        "serve.py.template",
        "register.py.template",
        "deploy.py.template",
    ]
    assert not list(TEMPLATES.rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_compiles_and_imports_what_there_is(script: Path) -> None:
    tree = ast.parse(script.read_text("utf-8"), script.name)
    compile(tree, script.name, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llama_onnx."):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_the_wheel_has_all_templates_and_native_files() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["llama_onnx.runtime"]
    runtime = ROOT / "runtime"
    # As setuptools does it: with Path.glob a star would match a leading dot too.
    packed = {name for line in patterns for name in glob.glob(line, root_dir=runtime)}  # noqa: PTH207
    files = [*(runtime / "bundles" / "templates").rglob("*"), *(runtime / "native").rglob("*")]
    there = {path.relative_to(runtime).as_posix() for path in files if path.is_file()}
    assert {name for name in there if "__pycache__" not in name} <= packed
