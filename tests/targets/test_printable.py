"""Printed text holds no command for a terminal, and keeps every letter."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.targets.printable import printable, shown

CONTROLS = {"Cc", "Cs", "Zl", "Zp"}


@given(st.text(st.characters(codec=None)))
def test_no_control_character_is_left(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(c) in CONTROLS for c in shown if c not in "\n\t")
    shown.encode("utf-8")
    assert printable(shown) == shown


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"])))
def test_letters_of_every_script_stay(text: str) -> None:
    assert printable(text) == text


def test_escapes_are_shown() -> None:
    assert printable("a\x1b[31m\u202eb\ud800") == "a\\x1b[31m\\u202eb\\ud800"


def test_a_value_made_of_many_short_ones_is_shown_short() -> None:
    texts = {str(i) * 40: [{"key" * 30: "x" * 99}] * 9 for i in range(9)}
    assert len(shown(texts)) == 200
    assert shown(["x" * 20] * 5).endswith("']")
