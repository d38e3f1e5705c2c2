"""Fails the build if a page would load anything from another site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?((?:https?:)?//[^"'\s>]+)""",
    re.IGNORECASE,
)
_CSS = re.compile(r"""(?:url\(|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


def foreign(text: str, suffix: str) -> list[str]:
    """Return the addresses on other sites that a browser would load for a .html or .css file."""
    found = (_CSS if suffix == ".css" else _LOADED).findall(text)
    return [match if isinstance(match, str) else "".join(match) for match in found]


def on_post_build(config: Any, **_: Any) -> None:
    """Read every page and style sheet of the finished site."""
    for file in sorted(Path(config["site_dir"]).rglob("*")):
        if file.suffix in (".html", ".css"):
            addresses = foreign(file.read_text(encoding="utf-8"), file.suffix)
            if addresses:
                raise RuntimeError(f"{file} loads {addresses[0]}: copy it to docs/assets.")
