"""Typed values of a stranger's settings: config.json, params.json, GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.printable import shown

MAX_SIZE = (1 << 31) - 1
"""Largest size of anything: many kernels count in 32 bits."""

MAX_NUMBER = 1e18


def is_number(text: str) -> bool:
    """Return whether `text` is a number of a few digits, such as a layer's in a tensor's name.

    >>> is_number("12"), is_number("²"), is_number("١"), is_number("9" * 5000)
    (True, False, False, False)
    """
    return text.isascii() and text.isdecimal() and len(text) < 10


class Keys:
    """Reads typed values from a mapping; every error names the file."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._raw, self._where = raw, where

    def integer(self, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """Return the positive integer at `key`; raises `CheckpointError` for anything else, and for
        one above `most`."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self._where}: {key} must be a positive integer, not {shown(value)}."
            )
        if value > most:
            raise CheckpointError(f"{self._where}: {key} is {value:,}, more than {most:,}.")
        return value

    def number(
        self,
        key: str,
        default: float | None = None,
        least: float = 1 / MAX_NUMBER,
        most: float = MAX_NUMBER,
    ) -> float:
        """Return the number at `key`, which is positive; raises `CheckpointError` for anything
        else, and for one that is not between `least` and `most`."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{self._where}: {key} must be a positive number, not {shown(value)}."
            )
        if not least <= value <= most:
            raise CheckpointError(
                f"{self._where}: {key} is {shown(value)}, which is not between {least:g} and "
                f"{most:g}."
            )
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return the boolean at `key`; raises `CheckpointError` for anything else, even 0 or 1."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self._where}: {key} must be true or false, not {shown(value)}."
            )
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self._raw.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self._where} lacks the key {key!r}.")
        return value
