"""Drafts from the text itself: what followed where its end occurred before (prompt lookup)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.speculation.rates import HitRate

Tokens = npt.NDArray[np.int64]

_LONGEST = 32
"""Tokens at the end of a text that are compared: longer matches are as good as certain."""

_MANY = 64
"""Places that are compared further once the last three tokens match; the latest ones."""

_BEHIND = 32
"""New tokens from which the rates are learned; of more, those before are skipped."""

_PRIORS = {1: 0.1, 2: 0.2, 3: 0.4, 4: 0.5, 6: 0.6, 9: 0.7, 14: 0.8, 22: 0.9}
"""Shortest match -> the chance that the next token is the same again, before any experience. A few
tokens change it."""


def find(tokens: Tokens) -> tuple[int, int]:
    """Return the length of the longest end of `tokens` that occurred before, and the place after
    its latest occurrence; 0, 0 if not even the last token did.

    >>> find(np.array([7, 1, 2, 3, 8, 1, 2, 3]))
    (3, 4)
    >>> find(np.array([1, 2, 3]))
    (0, 0)
    """
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[:last] == tokens[last])
    if not len(ends):
        return 0, 0
    length = 1
    while length < _LONGEST:
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[last - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
        if length >= 3:
            ends = ends[-_MANY:]
    return length, int(ends[-1]) + 1


def continuation(tokens: Tokens, place: int, count: int) -> list[int]:
    """Return the `count` tokens from `place` on; where the text ends, it goes on with its draft.

    >>> continuation(np.array([5, 1, 2, 1, 2]), 3, 5)
    [1, 2, 1, 2, 1]
    """
    found: list[int] = tokens[place : place + count].tolist()
    period = len(found)
    while len(found) < count:
        found.append(found[len(found) - period])
    return found


class Ngrams:
    """The longest end of a text that occurred before, and how often it went on as before.

    That is known for every new token, drafted or not, so nothing has to be tried to learn it.
    """

    def __init__(self) -> None:
        self._by_length = [HitRate(0.0)]  # of a match of 0, 1, 2 ... tokens
        for length in range(1, _LONGEST + 1):
            prior = _PRIORS.get(length)
            self._by_length.append(self._by_length[-1] if prior is None else HitRate(prior))
        self._seen = self._length = self._place = 0

    def follow(self, tokens: Tokens) -> None:
        """Look at the tokens that a text has got since the last call, and learn from them."""
        start = self._seen
        if not start or len(tokens) - start > _BEHIND:
            start = len(tokens) - 1
            self._length = 0
        for end in range(start, len(tokens)):
            if self._length:
                hit = tokens[self._place] == tokens[end]
                self._by_length[min(self._length, _LONGEST)].note(bool(hit))
                if hit:
                    self._length += 1
                    self._place += 1
                    continue
            self._length, self._place = find(tokens[: end + 1])
        self._seen = len(tokens)

    def chances(self, most: int) -> Sequence[float]:
        """Return for each of up to `most` tokens the chance that it comes after those before it."""
        if not self._length:
            return ()
        return [self._by_length[min(self._length + i, _LONGEST)].value for i in range(most)]

    def draft(self, tokens: Tokens, count: int) -> list[int]:
        """Return the `count` tokens that may come next."""
        return continuation(tokens, self._place, count)
