"""Find stop strings in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

MAX_STOPS = 256
"""Most stop strings of one answer: each is looked for in every piece of text."""

MAX_STOP_LENGTH = 1024
"""Most characters of one: so many may be held back before they are shown."""


def check_stops(stop: Any, name: str = "stop") -> tuple[str, ...]:
    """Return the stop strings in `stop`, which is one text or several.

    Raises `UsageError` for anything else, an empty text, too many of them or one that is too long.

    >>> check_stops("ab"), check_stops(["a", "b"])
    (('ab',), ('a', 'b'))
    """
    if isinstance(stop, str):
        stop = [stop]
    # The keys of a mapping are not what anybody means.
    if isinstance(stop, Mapping) or not isinstance(stop, Iterable):
        raise UsageError(f"{name} must be a text or a list of texts, not {shown(stop)}.")
    stops: list[str] = []
    for text in stop:
        if len(stops) == MAX_STOPS:
            has = f"{len(stop):,} texts, more" if isinstance(stop, Sized) else "more"
            raise UsageError(f"{name} has {has} than the {MAX_STOPS} allowed.")
        if not isinstance(text, str) or not text:
            raise UsageError(f"{name} must hold texts that are not empty, not {shown(text)}.")
        if len(text) > MAX_STOP_LENGTH:
            raise UsageError(
                f"{name} has a text of {len(text):,} characters, more than the "
                f"{MAX_STOP_LENGTH:,} allowed."
            )
        stops.append(text)
    return tuple(stops)


class StopFilter:
    """Passes text through up to the first stop string, which is left out.

    Text that may be the start of a stop string is held back until that is known. The first stop
    string is the one that ends first, so the result does not depend on how the text was split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Add the next piece and return the text that can be shown now."""
        if not self._stops:
            return piece
        text = self._held + piece
        matches = [(i + len(stop), i) for stop in self._stops if (i := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        shown = len(text) - self._partial_match(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return what is still held back; call it when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Return the length of the longest end of `text` that may start a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
