"""A stranger's regular expressions, matched to names within a limit of time.

The expressions in adapter_config.json may backtrack for ever: `(a+)+$` tries 2**n ways. `regex` is
the module that transformers matches with: the same expressions as `re`, lookarounds included, and
unlike `re` it can be stopped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import regex

MAX_LENGTH = 2000
"""Longest expression, in characters; a name in a Llama has 40."""

_SECONDS = 1.0  # for all names together: a sound expression takes microseconds for each


class PatternError(ValueError):
    """What is wrong with an expression, to follow it: "is not a valid regular expression"."""


class Pattern:
    """The expression `text`; `form` is what surrounds it, with `{}` in its place.

    Raises `PatternError` for an invalid one, and as soon as all calls together took too long.
    """

    def __init__(self, text: str, form: str = "{}") -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"has {len(text):,} characters, more than the {MAX_LENGTH:,} allowed")
        try:
            re.compile(text)  # what PEFT does; `regex` accepts more
            self._compiled = regex.compile(form.replace("{}", text))
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            reason = str(error) or "too large"
            raise PatternError(f"is not a valid regular expression: {reason}") from None
        self._left = _SECONDS

    def fullmatch(self, name: str) -> bool:
        """Return whether the expression matches all of `name`."""
        return self._timed(self._compiled.fullmatch, name) is not None

    def match(self, name: str) -> regex.Match[str] | None:
        """Return the match at the start of `name`."""
        return self._timed(self._compiled.match, name)

    def _timed(
        self, find: Callable[..., regex.Match[str] | None], name: str
    ) -> regex.Match[str] | None:
        started = time.perf_counter()
        try:
            found = find(name, timeout=max(self._left, 0.001))
        except (TimeoutError, MemoryError):
            raise PatternError("takes too long to match: write it without nested repeats") from None
        self._left -= time.perf_counter() - started
        if self._left < 0:
            raise PatternError("takes too long to match: write it without nested repeats")
        return found
