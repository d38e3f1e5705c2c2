"""docs/api.md shows every public name: MkDocs takes their docstrings from the code."""

from __future__ import annotations

import re
from pathlib import Path

import llama_onnx

PAGE = Path(__file__).parents[2] / "docs/api.md"


def test_every_public_name_is_on_the_page() -> None:
    shown = re.findall(r"^::: llama_onnx\.(\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {*shown, "__version__"} == set(llama_onnx.__all__)
