"""Links in the Markdown files at the top; MkDocs checks those in docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "CONTRIBUTING.md")
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]*))?\)")


def dead_links(file: Path) -> list[str]:
    """Return the relative links of a Markdown file whose file or heading is missing."""
    return [
        "#".join(filter(None, link))
        for link in _LINK.findall(_without_code(file.read_text(encoding="utf-8")))
        if not _leads_somewhere(file, *link)
    ]


def _leads_somewhere(file: Path, path: str, anchor: str) -> bool:
    target = file.parent / path if path else file
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.*)$", _without_code(page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-") for text in headings}


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", FILES)
def test_relative_links_lead_somewhere(name: str) -> None:
    assert dead_links(ROOT / name) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, twice\n[a](page.md) [b](gone.md) [c](#a-heading-twice) [d](page.md#gone)\n"
        "[e](https://example.org/gone)\n```\n[f](gone)\n```\n",
        encoding="utf-8",
    )
    assert dead_links(page) == ["gone.md", "page.md#gone"]


_PATH = re.compile(
    r"(?<![\w/.-])((?:api|benchmarks|docs|examples|exporter|runtime|targets|tests)/[\w./-]*\w)"
)
PAGES = sorted([*(ROOT / name for name in FILES), *(ROOT / "docs").glob("*.md")])


def missing_paths(text: str) -> list[str]:
    """Return the repository paths that a page names in code and that do not exist."""
    code = re.findall(r"`([^`\n]+)`", text)
    named = {path for part in code for path in _PATH.findall(part)}
    return sorted(path for path in named if not (ROOT / path).exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_in_code_exist(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8")) == []


def test_a_path_that_is_gone_is_found() -> None:
    text = "`targets/cpu.py` and `python benchmarks/gone.py --x`, work/targets/gone, `a/docs/b`"
    assert missing_paths(text) == ["benchmarks/gone.py"]
