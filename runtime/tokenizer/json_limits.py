"""Limits of a tokenizer.json, checked before the library `tokenizers` reads it.

The library follows the file whatever it says: twelve steps that each replace a letter by ten make a
terabyte of one letter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAX_PIECES = 500_000
"""Most tokens of a vocabulary; Gemma has 262,000."""

_MAX_MERGES, _MAX_ADDED, _MAX_STEPS = 1_000_000, 20_000, 100
_MAX_ID = 1 << 24
"""Largest id: the library counts up to it when it reads the file."""

_MAX_TOKEN = 10_000  # characters
_MAX_GROWTH = 1000  # of a text by all replacements together, and characters put in front of it
_MAX_AROUND = 100  # tokens that a post-processor puts around a text


def exceeded_limit(value: Any) -> str | None:
    """Return what of the tokenizer.json with the content `value` is too large to be read, or None.

    >>> exceeded_limit({"normalizer": {"type": "Prepend", "prepend": "_" * 10_000}})
    'its steps make a text 10,000 times as long'
    """
    if not isinstance(value, dict):
        return None
    model = value.get("model")
    model = model if isinstance(model, dict) else {}
    for what, items, most in (
        ("tokens", model.get("vocab"), MAX_PIECES),
        ("merges", model.get("merges"), _MAX_MERGES),
        ("added tokens", value.get("added_tokens"), _MAX_ADDED),
    ):
        if isinstance(items, dict | list) and len(items) > most:
            return f"it has {len(items):,} {what}, more than {most:,}"
    largest = max(_ids(value, model), default=0)
    if largest > _MAX_ID:
        return f"it has a token with the id {largest:,}"
    vocabulary = model.get("vocab")
    longest = max(map(len, vocabulary), default=0) if isinstance(vocabulary, dict) else 0
    if longest > _MAX_TOKEN:
        return f"it has a token of {longest:,} characters"
    return _exceeded_by_steps(value)


def _ids(value: dict[str, Any], model: dict[str, Any]) -> Iterator[int]:
    vocabulary, added = model.get("vocab"), value.get("added_tokens")
    if isinstance(vocabulary, dict):
        yield from (index for index in vocabulary.values() if isinstance(index, int))
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and isinstance(index := token.get("id"), int):
            yield index


def _exceeded_by_steps(value: dict[str, Any]) -> str | None:
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        steps = list(_steps(value.get(part)))
        if len(steps) > _MAX_STEPS:
            return f"its {part} has {len(steps):,} steps"
        growth = 1
        for step in steps:
            texts = (step.get("content"), step.get("prepend"), step.get("replacement"))
            growth *= max(1, *(len(text) for text in texts if isinstance(text, str)), 1)
            if growth > _MAX_GROWTH:
                return f"its steps make a text {growth:,} times as long"
            if (around := _tokens_around(step)) > _MAX_AROUND:
                return f"its {part} puts {around:,} tokens around a text"
    return None


def _tokens_around(step: dict[str, Any]) -> int:
    """Return the most tokens that the template of a post-processor can add to a text."""
    special, pieces = step.get("special_tokens"), step.get("single")
    if not isinstance(special, dict) or not isinstance(pieces, list):
        return 0
    ids = [value.get("ids") for value in special.values() if isinstance(value, dict)]
    return len(pieces) * max((len(some) for some in ids if isinstance(some, list)), default=0)


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every step in `value`, inner ones included."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if "type" in item:
                yield item
            pending += item.values()
        elif isinstance(item, list):
            pending += item
