"""JSON from a stranger: bounded in size, and only values that every later step can handle."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

MAX_BYTES = 64 << 20
"""Largest JSON text, in bytes: Llama 3's tokenizer.json has 17 MB, Gemma's 33 MB."""

MAX_VALUES = 4_000_000
"""Most values in a text. An empty list takes two bytes of text and 56 of memory, so the number of
values is what bounds the memory."""

MAX_DEPTH = 100
"""Most lists and objects inside one another; how many Python itself handles depends on its version
and on what is done with them."""

MAX_DIGITS = 64
"""Longest integer. transformers writes `model_max_length` with 31 digits."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JSONError(ValueError):
    """What is wrong with a JSON text, to follow a file name: "is not UTF-8 text"."""


def parse_json(text: bytes, *, unique: bool = False, max_bytes: int = MAX_BYTES) -> Any:
    """Return the value of the JSON `text`, which is UTF-8 with or without a byte order mark.

    Stricter than the standard library, which accepts what later steps cannot handle: refuses NaN
    and infinite numbers, integers of more than 64 digits, lone surrogates, deep nesting, and with
    `unique` an object that has a key twice (two readers may take different ones). Raises
    `JSONError`.

    >>> parse_json(b'{"eps": 1e-5}')
    {'eps': 1e-05}
    >>> try:
    ...     parse_json(b"[1e400]")
    ... except JSONError as error:
    ...     print(error)
    has the number 1e400, which is out of range
    """
    check_size(text, max_bytes)
    try:
        value = json.loads(
            text.decode("utf-8-sig"),
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_unique_pairs if unique else None,
        )
    except UnicodeDecodeError:
        raise JSONError("is not UTF-8 text") from None
    except RecursionError:
        raise JSONError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise JSONError(f"is not valid JSON (line {error.lineno}: {error.msg})") from None
    _check_depth(value)
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def check_size(text: bytes, max_bytes: int = MAX_BYTES) -> None:
    """Raise `JSONError` if parsing `text` would take far more memory than a sound file needs."""
    if len(text) > max_bytes:
        raise JSONError(f"has {len(text):,} bytes, more than the {max_bytes:,} allowed")
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise JSONError(f"has more than {MAX_VALUES:,} values")


def _parse_int(digits: str) -> int | float:
    if digits == "-0":  # a float to the JSON readers of Rust and JavaScript
        return -0.0
    if len(digits) > MAX_DIGITS:
        raise JSONError(f"has a number of {len(digits):,} digits")
    return int(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JSONError(f"has the number {digits[:20]}, which is out of range")
    return value


def _refuse_constant(name: str) -> float:
    raise JSONError(f"has {name}, which is not a JSON number")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise JSONError(f"has the key {twice!r} twice")
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    if level:
        raise JSONError("is nested too deeply")


def _check_surrogates(value: Any) -> None:
    # Half of a UTF-16 pair cannot be written as UTF-8: each later write or print would fail.
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise JSONError("has half of a surrogate pair (\\ud800 to \\udfff) in a text") from None
