"""Drafts from a smaller model with the same tokens, which reads the text along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class DraftRows(Protocol):
    """Caches of the draft's sequences."""

    def open(self, key: int, most: int) -> None:
        """Start a sequence of at most `most` positions."""

    def close(self, key: int) -> None:
        """End a sequence."""

    def filled(self, key: int) -> int:
        """Return how many positions of a sequence are in its cache."""

    def read(self, key: int, ids: Tokens, options: Any = None) -> Logits:
        """Append `ids` to a sequence and return the logits [V] after the last of them."""

    def step(self, tokens: Mapping[int, int], options: Any = None) -> Mapping[int, Logits]:
        """Append a token to each sequence and return the logits [V] after it."""

    def rewind(self, key: int, filled: int) -> None:
        """Forget the positions of a sequence from `filled` on."""


class DraftModel:
    """The likeliest next tokens of a model whose cache follows the texts of another.

    `open_rows` returns its caches, which are freed with the last sequence. It takes texts of
    `context_length` tokens, all below `vocab_size`.
    """

    def __init__(
        self, open_rows: Callable[[], DraftRows], vocab_size: int, context_length: int, longest: int
    ) -> None:
        self._open_rows = open_rows
        self._rows: DraftRows | None = None
        self._vocab_size, self._context_length = vocab_size, context_length
        self._longest = longest
        self._keys: set[int] = set()

    def unread(self, key: int, tokens: Tokens) -> int:
        """Return how many tokens of a text it has to read before it can draft."""
        return len(tokens) - (self._rows.filled(key) if self._rows and key in self._keys else 0)

    def reads(self, key: int) -> bool:
        """Return whether it has read some of a text."""
        return key in self._keys

    def room(self, tokens: Tokens) -> int:
        """Return how many tokens it can draft after `tokens`, 0 if it cannot read them."""
        if tokens.max() >= self._vocab_size:
            return 0
        return max(0, self._context_length - len(tokens))

    def read(self, key: int, tokens: Tokens, most: int, options: Any = None) -> Logits | None:
        """Read on in a text of at most `most` tokens; None: there is still more to read."""
        if self._rows is None:
            self._rows = self._open_rows()
        if key not in self._keys:
            self._keys.add(key)
            self._rows.open(key, min(most, self._context_length))
        unread = tokens[self._rows.filled(key) :]
        logits = self._rows.read(key, unread[: self._longest], options)
        return logits if len(unread) <= self._longest else None

    def draft(self, key: int, logits: Logits, count: int, options: Any = None) -> list[int]:
        """Return `count` tokens, the first by `logits`: those after what was read."""
        assert self._rows is not None
        drafts = [int(logits.argmax())]
        while len(drafts) < count:
            logits = self._rows.step({key: drafts[-1]}, options)[key]
            drafts.append(int(logits.argmax()))
        return drafts

    def rewind(self, key: int, length: int) -> None:
        """Forget what was drafted beyond a text's first `length` tokens."""
        if self._rows is not None and key in self._keys:
            self._rows.rewind(key, min(length, self._rows.filled(key)))

    def forget(self, key: int) -> None:
        """Free the cache of a text."""
        if key in self._keys:
            self._keys.remove(key)
            if self._rows is not None:
                self._rows.close(key)
        if not self._keys:
            self._rows = None
