"""What onnxruntime-genai's parser of chat templates survives; it reads one with the tokenizer.

Measured with version 0.18 and a stack of 1 MiB, which threads have on Windows: it recurses for each
character of a name, of a run of spaces and of a comment, and overflows after some thousands; a tag
takes time by the square of its length, and minutes after 6,000 characters.
"""

from __future__ import annotations

import re

MOST_RUN = 1000
"""Characters of a name, and spaces in a row."""

MOST_COMMENT = 2000
MOST_TAG = 3000
"""Characters between the marks of a tag, without those of texts in quotes."""

MOST_TAGS = 800
MOST_BLOCKS = 100
"""Blocks inside one another."""

_RUN = re.compile(rf"\s{{{MOST_RUN + 1}}}|\w{{{MOST_RUN + 1}}}")
_OPENS = re.compile(r"\{[{%#]")
_STATEMENT = re.compile(r"[-+~]?\s*(\w*)")
_PIECE = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^'\"]", re.DOTALL)
_BLOCKS = frozenset({"if", "for", "macro", "filter", "call", "generation"})


def exceeded_bound(text: str) -> str | None:
    """Return what of the template `text` the parser may not survive, None if it does.

    >>> exceeded_bound("{{ " + "a" * 2000 + " }}")
    'has a name or a run of spaces of more than 1,000 characters'
    """
    if _RUN.search(text):
        return f"has a name or a run of spaces of more than {MOST_RUN:,} characters"
    depth = position = tags = 0
    while found := _OPENS.search(text, position):
        start, kind = found.end(), found[0][1]
        if kind == "#":
            end = text.find("#}", start)
            if not 0 <= end - start <= MOST_COMMENT:
                return f"has a comment of more than {MOST_COMMENT:,} characters"
        else:
            tags += 1
            if tags > MOST_TAGS:
                return f"has more than {MOST_TAGS} tags"
            end = _tag_end(text, start, "}}" if kind == "{" else "%}")
            if end < 0:
                return f"has a tag of more than {MOST_TAG:,} characters, or without an end"
        if kind == "%":
            statement = _STATEMENT.match(text, start)
            name = statement[1] if statement else ""
            depth += (name in _BLOCKS) - name.startswith("end")
            if depth > MOST_BLOCKS:
                return f"has more than {MOST_BLOCKS} blocks inside one another"
        position = end + 2
    return None


def _tag_end(text: str, start: int, mark: str) -> int:
    """Return where `mark` ends a tag, -1 if that is nowhere or too far."""
    position = start
    for _ in range(MOST_TAG):
        if text.startswith(mark, position):
            return position
        piece = _PIECE.match(text, position)
        if piece is None:  # the end, or a text in quotes without one
            return -1
        position = piece.end()
    return -1
