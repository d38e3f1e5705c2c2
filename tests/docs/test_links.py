"""Links in the Markdown files at the top; MkDocs checks those in docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "CONTRIBUTING.md")
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]*))?\)")


def dead_links(file: Path) -> list[str]:
    """Relative links of a Markdown file whose file or heading is not there."""
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
