"""Copy the part of llama-onnx that a script runs, as source: llama-onnx is not on PyPI."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llama_onnx.runtime.bundles.template_files import write_text
from llama_onnx.targets import errors

_HOUSES = {"runtime": Path(__file__).parents[1], "targets": Path(errors.__file__).parent}
"""The folders of this project that are needed to run a package."""


def copy_runtime(script: Path, folder: Path) -> None:
    """Copy the modules that `script` imports, and all that they import, to `folder`/llama_onnx,
    the data that these read, and the license."""
    root, needed = folder / "llama_onnx", needed_files(script)
    for house, source in _HOUSES.items():
        for file in sorted(file for file in needed if file.is_relative_to(source)):
            target = root / house / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    # Not a namespace package: an installed llama_onnx must not take precedence over this one.
    write_text(root / "__init__.py", '"""The code that runs a package."""\n')
    shutil.copyfile(_HOUSES["runtime"] / "native" / "LICENSE", root / "LICENSE")


@cache
def needed_files(script: Path) -> frozenset[Path]:
    """Return the modules of this project that `script` needs, `__init__.py` of their folders, and
    the data of those that read any."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        module = waiting.pop()
        for name in _imports(ast.parse(module.read_text("utf-8"))):
            fresh = set(_modules(name)) - found
            found |= fresh
            waiting += fresh
            if name == "importlib.resources.files":
                found |= set(_data(module.parent))
    return frozenset(found)


def _data(folder: Path) -> Iterator[Path]:
    """Yield what is beside modules in `folder`, and in its folders that have no modules."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".py":
            yield path
        elif path.is_dir() and path.name != "__pycache__" and not any(path.rglob("*.py")):
            yield from (file for file in path.rglob("*") if file.is_file())


def _imports(node: ast.AST) -> Iterator[str]:
    """Yield the dotted names that a module imports, in functions too, but not for type checkers."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and _is_for_type_checkers(node):
        for statement in node.orelse:
            yield from _imports(statement)
    elif not isinstance(node, ast.expr):
        for child in ast.iter_child_nodes(node):
            yield from _imports(child)


def _is_for_type_checkers(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _modules(name: str) -> Iterator[Path]:
    """Yield the module of the dotted `name`, which may be one of its members, and its folders'."""
    first, *parts = name.split(".")
    if first != "llama_onnx" or not parts or parts[0] not in _HOUSES:
        return
    path = _HOUSES[parts[0]]
    for part in (*parts[1:], ""):
        yield path / "__init__.py"
        path = path / part
        if path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")
            return
        if not path.is_dir():
            return
