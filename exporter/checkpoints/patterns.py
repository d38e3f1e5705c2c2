"""A stranger's regular expressions, matched to the names of modules within a limit of time.

The expressions in adapter_config.json may backtrack for ever: `(a+)+$` tries 2**n ways. `regex` is
the module that transformers matches with: the same expressions as `re`, lookarounds included, and
unlike `re` it can be stopped.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import regex

from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.printable import shown

MAX_LENGTH = 2000
"""Longest expression, in characters; a name in a Llama has 40."""

# `regex` reads these otherwise than `re`: [[:alpha:]] as a class, (?:q){e<=1} as "about q".
_READ_OTHERWISE = re.compile(r"\[\^?\[?:|\{[^0-9,]")

_SECONDS, _SECONDS_PER_CALL = 5.0, 1.0  # a sound expression takes a microsecond


@dataclass
class TimeLimit:
    """The seconds left for all matches of one file's expressions together."""

    left: float = _SECONDS


class Pattern:
    """The expression `text`, called `label` in messages. `form` is what PEFT puts around it, with
    `{}` in its place. All expressions of a file share a `limit`.

    Raises `CheckpointError` for an invalid one, and as soon as matching takes too long.
    """

    def __init__(self, text: str, label: str, limit: TimeLimit, form: str = "{}") -> None:
        self._label, self._limit = f"{label} {shown(text)}", limit
        if len(text) > MAX_LENGTH:
            raise CheckpointError(
                f"{self._label} has {len(text):,} characters, more than the {MAX_LENGTH:,} allowed."
            )
        if _READ_OTHERWISE.search(text):
            raise CheckpointError(
                f"{self._label} has a character class or brace that is not supported: list the "
                "names of the modules instead."
            )
        try:
            re.compile(form.replace("{}", text))  # as PEFT does; `regex` accepts more
            self._compiled = regex.compile(form.replace("{}", text))
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as error:
            reason = str(error) or "it is too large"
            raise CheckpointError(
                f"{self._label} is not a valid regular expression: {reason}."
            ) from None

    def fullmatch(self, name: str) -> bool:
        """Return whether the expression matches all of `name`."""
        return self._match(name, whole=True) is not None

    def match(self, name: str) -> regex.Match[str] | None:
        """Return the match at the start of `name`."""
        return self._match(name, whole=False)

    def _match(self, name: str, *, whole: bool) -> regex.Match[str] | None:
        find = self._compiled.fullmatch if whole else self._compiled.match
        started = time.perf_counter()
        try:
            found = find(name, timeout=_SECONDS_PER_CALL)
        except (TimeoutError, MemoryError):
            self._limit.left = 0
            found = None
        self._limit.left -= time.perf_counter() - started
        if self._limit.left < 0:
            raise CheckpointError(
                f"{self._label} takes too long to match: list the names of the modules instead."
            )
        return found
