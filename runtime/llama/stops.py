"""Stop strings in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on up to the first stop string, of which nothing is ever passed on.

    What could be the start of a stop string is held back until that is decided. Which stop string
    comes first is a matter of where it ends, so that the result does not depend on how the text was
    cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Take in the next piece; returns the text that can be shown by now."""
        text = self._held + piece
        matches = [(i + len(stop), i) for stop in self._stops if (i := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        shown = len(text) - self._partial_match(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return what is still held back: the text ended, so it is no stop string after all."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Length of the longest end of `text` that starts a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
