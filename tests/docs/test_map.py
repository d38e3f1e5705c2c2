"""The map in docs/architecture.md names only existing paths, and every folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSES = ("api", "exporter", "runtime", "targets")
DATA = ("templates", "samples")
"""Folders whose subfolders are not in the map."""


def read_map(page: str) -> set[str]:
    """Return the paths in the map; folders end with a slash."""
    (text,) = re.findall(r"<!-- map -->\s*```text\n(.*?)```\s*<!-- end of map -->", page, re.DOTALL)
    paths: set[str] = set()
    parents: list[str] = []
    for line in filter(str.strip, text.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        del parents[depth:]
        paths.add("".join([*parents, name]))
        parents.append(name)
    return paths


def folders(root: Path) -> set[str]:
    """Return the top-level folders' subfolders with files, as the map writes them."""
    found = {
        file.parent.relative_to(root)
        for house in HOUSES
        for file in (root / house).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    return {
        f"{folder.as_posix()}/" for folder in found if not set(DATA) & set(folder.parts[:-1])
    } | {
        f"{parent.as_posix()}/"
        for folder in found
        for parent in folder.parents
        if parent.name in DATA
    }


PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(read_map(PAGE)))
def test_what_the_map_names_is_there(path: str) -> None:
    there = ROOT / path
    assert there.is_dir() if path.endswith("/") else there.is_file()


def test_every_folder_is_in_the_map() -> None:
    named = {path for path in read_map(PAGE) if path.endswith("/")}
    assert folders(ROOT) - named == set()


def test_the_reader_of_the_map_sees_depth(tmp_path: Path) -> None:
    page = (
        "<!-- map -->\n```text\na/     one\n  b.py   two\n  c/\n    d/\n\ne/\n  f.py\n```\n"
        "<!-- end of map -->"
    )
    assert read_map(page) == {"a/", "a/b.py", "a/c/", "a/c/d/", "e/", "e/f.py"}
    (tmp_path / "runtime/new").mkdir(parents=True)
    (tmp_path / "runtime/new/module.py").touch()
    (tmp_path / "runtime/templates/x").mkdir(parents=True)
    (tmp_path / "runtime/templates/x/file").touch()
    assert folders(tmp_path) == {"runtime/new/", "runtime/templates/"}
