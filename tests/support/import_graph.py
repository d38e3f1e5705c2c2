"""The structure of the source, read from its text: `python -m tests.support.import_graph [ROOT]`.

Nothing is imported, so ROOT may be a checkout of another commit.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

HOUSES = ("api", "exporter", "runtime", "targets")
"""Folders with modules. `api` is mapped to `llama_onnx` itself, the others to `llama_onnx.NAME`."""

OTHERS = ("benchmarks", "examples")
"""More folders with Python; `tests` is not among them."""

FUNCTION_LINES, FILE_LINES = 60, 400

Edges = Mapping[str, set[str]]


class Source:
    """The modules of a checkout and what each imports."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, house: str) -> list[Path]:
        """The Python files of a house."""
        return sorted((self.root / house).rglob("*.py"))

    @cached_property
    def modules(self) -> Mapping[str, Path]:
        """Dotted name -> file, packages included."""
        return {self._dotted(file): file for house in HOUSES for file in self.files(house)}

    def imports(self, file: Path) -> Iterator[str]:
        """Dotted names that a file imports, at its top or in a function; relative ones resolved."""
        package = ["llama_onnx", *self._parts(file)[:-1]]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                yield from (f"{origin}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                yield from (str(a.value) for a in node.args if isinstance(a, ast.Constant))

    @cached_property
    def edges(self) -> Edges:
        """Module -> the modules of this project that it imports."""
        return {
            name: {found for text in self.imports(file) if (found := self._resolve(text))} - {name}
            for name, file in self.modules.items()
        }

    @cached_property
    def folder_edges(self) -> Mapping[str, Mapping[str, set[str]]]:
        """Folder -> folder it imports from -> by which modules. A subfolder is another folder."""
        edges: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name, imported in self.edges.items():
            for other in imported:
                here, there = self._folder(name), self._folder(other)
                if here != there:
                    edges[here][there].add(f"{name} -> {other}")
        return edges

    def cycles(self) -> list[list[str]]:
        """Return the groups of modules that import one another in a circle."""
        return [sorted(group) for group in components(self.edges) if len(group) > 1]

    def folder_pairs(self) -> list[tuple[str, str]]:
        """Pairs of folders that import from each other."""
        edges = self.folder_edges
        return sorted(
            (a, b) for a in list(edges) for b in edges[a] if a < b and a in edges.get(b, {})
        )

    def loose(self, house: str) -> list[str]:
        """Modules at the top of a house, in no folder."""
        found = (self.root / house).glob("*.py")
        return sorted(file.name for file in found if file.name != "__init__.py")

    def names_used_twice(self) -> dict[str, list[str]]:
        """File name -> folders, of names in several folders."""
        folders = defaultdict(list)
        for file in self.modules.values():
            folders[file.name].append(file.parent.relative_to(self.root).as_posix())
        folders.pop("__init__.py", None)
        return {name: where for name, where in sorted(folders.items()) if len(where) > 1}

    def long_functions(self) -> list[tuple[str, int]]:
        """Functions of more than `FUNCTION_LINES` lines outside tests, and how long they are. Their
        docstrings do not count: the public functions explain each argument."""
        return [
            (f"{file.relative_to(self.root).as_posix()}: {node.name}", lines)
            for file in self._all_python()
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (lines := lines_of(node)) > FUNCTION_LINES
        ]

    def long_files(self) -> list[tuple[str, int]]:
        """Files of more than `FILE_LINES` lines outside tests, and how long they are."""
        lengths = {
            file.relative_to(self.root).as_posix(): len(file.read_text("utf-8").splitlines())
            for file in self._all_python()
        }
        return [(name, lines) for name, lines in lengths.items() if lines > FILE_LINES]

    def _all_python(self) -> Iterator[Path]:
        for folder in (*HOUSES, *OTHERS):
            yield from sorted((self.root / folder).rglob("*.py"))
        yield from sorted(self.root.glob("*.py"))

    def _dotted(self, file: Path) -> str:
        parts = self._parts(file)
        return ".".join(["llama_onnx", *(part for part in parts if part != "__init__")])

    def _parts(self, file: Path) -> tuple[str, ...]:
        parts = file.relative_to(self.root).with_suffix("").parts
        return parts[1:] if parts[0] == "api" else parts

    def _resolve(self, text: str) -> str | None:
        """Return the module that a dotted name names or is part of."""
        parts = text.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((prefix for prefix in prefixes if prefix in self.modules), None)

    def _folder(self, module: str) -> str:
        return self.modules[module].parent.relative_to(self.root).as_posix()


def components(edges: Edges) -> list[set[str]]:
    """Strongly connected components, by Tarjan's algorithm."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        stack.append(name)
        for other in edges.get(name, ()):
            if other not in number:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], number[other])
        if lowest[name] == number[name]:
            start = stack.index(name)
            found.append(set(stack[start:]))
            del stack[start:]

    for name in edges:
        if name not in number:
            visit(name)
    return found


def report(root: Path) -> Iterator[str]:
    """Yield the figures, one per line, each followed by what it counts."""
    source = Source(root)
    yield f"modules: {sum(file.name != '__init__.py' for file in source.modules.values())}"
    yield from _counted("module cycles", [", ".join(group) for group in source.cycles()])
    pairs = [f"{a} <-> {b}" for a, b in source.folder_pairs()]
    yield from _counted("folder pairs that need each other", pairs)
    for house in ("exporter", "runtime"):
        yield from _counted(f"loose modules at the top of {house}", source.loose(house))
    twice = [f"{name}: {', '.join(where)}" for name, where in source.names_used_twice().items()]
    yield from _counted("file names used twice or more", twice)
    functions = [f"{name} ({lines})" for name, lines in source.long_functions()]
    yield from _counted(f"functions over {FUNCTION_LINES} lines", functions)
    files = [f"{name} ({lines})" for name, lines in source.long_files()]
    yield from _counted(f"files over {FILE_LINES} lines", files)


def _counted(what: str, entries: list[str]) -> Iterator[str]:
    yield f"{what}: {len(entries)}"
    yield from (f"    {entry}" for entry in entries)


if __name__ == "__main__":
    print("\n".join(report(Path(sys.argv[1] if len(sys.argv) > 1 else "."))))


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is None or first.end_lineno is None:
        return lines
    return lines - (first.end_lineno - first.lineno + 1)
