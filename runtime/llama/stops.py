"""Find stop strings in a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence


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
