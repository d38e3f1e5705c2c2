"""What .github/workflows promises: sessions that exist, pinned actions, and no more rights than
needed. `nox -s workflows` checks the rest, with actionlint."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WRITES = {"docs.yml": {"pages", "id-token"}, "release.yml": {"id-token"}}
"""File -> what its last job may write."""


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text("utf-8"))


def sessions_of_nox() -> set[str]:
    """The names of the functions with @nox.session, or those that it gives them."""
    found = set()
    for node in ast.parse((ROOT / "noxfile.py").read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if "nox.session" in (text := ast.unparse(decorator)):
                    named = re.search(r"name='([\w-]+)'", text)
                    found.add(named[1] if named else node.name)
    return found


def sessions_called(file: Path) -> set[str]:
    text = file.read_text("utf-8")
    called = {name for line in re.findall(r"nox --session (.*)", text) for name in line.split()} - {
        "${{",
        "}}",
        "matrix.session",
    }
    matrices = re.findall(r"session: \[(.*)\]", text)
    return called | {name.strip() for line in matrices for name in line.split(",")}


def test_there_is_one_for_each_purpose() -> None:
    expected = ["docs", "lint", "macos", "release", "tests", "windows"]
    assert [file.stem for file in FILES] == expected


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_sessions_exist(file: Path) -> None:
    assert sessions_called(file) and sessions_called(file) <= sessions_of_nox()


def test_ci_s_sessions_are_all_run() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    (line,) = re.findall(r"nox --session (.*)", script)
    assert set(line.split()) <= set().union(*map(sessions_called, FILES))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_actions_are_pinned_to_a_commit(file: Path) -> None:
    for line in re.findall(r"uses: (.*)", file.read_text("utf-8")):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+(\.\d+)*", line), line


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_may_write_but_what_publishes(file: Path) -> None:
    workflow = load(file)
    assert workflow["permissions"] == {"contents": "read"}
    given = [job["permissions"] for job in workflow["jobs"].values() if "permissions" in job]
    assert [set(rights) for rights in given] == ([WRITES[file.name]] if file.name in WRITES else [])
    assert "secrets" not in file.read_text("utf-8")
    assert "pull_request_target" not in file.read_text("utf-8")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_never_ran_says_so(file: Path) -> None:
    assert file.read_text("utf-8").startswith("# Never run: remove this line when it has.")
