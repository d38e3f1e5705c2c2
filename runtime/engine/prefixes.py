"""What was read before: the keys and values of earlier texts, for texts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.cache_layout import Block

Tokens = npt.NDArray[np.int64]

SHORTEST = 16
"""Fewer tokens are read again sooner than copied."""


def common(a: Tokens, b: Tokens) -> int:
    """Return how many tokens `a` and `b` have in common at their start.

    >>> common(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


@dataclass(frozen=True)
class Entry:
    """The tokens of a text and what the graph computed of them, with the adapter `group`."""

    group: str | None
    tokens: Tokens
    block: Block

    def start(self, length: int) -> Entry:
        """Return the first `length` positions, as views of the same arrays."""
        parts = {name: part[:, :length] for name, part in self.block.items()}
        return Entry(self.group, self.tokens[:length], parts)


class Prefixes:
    """Entries in the order of their last use; the longest unused go when room is needed."""

    def __init__(self, position_bytes: int) -> None:
        self._position_bytes = position_bytes
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._number = 0
        self.positions = 0

    def __len__(self) -> int:
        """Return how many texts are kept."""
        return len(self._entries)

    @property
    def size(self) -> int:
        """The bytes of all entries."""
        return self.positions * self._position_bytes

    def find(self, group: str | None, tokens: Tokens) -> tuple[int, Entry | None]:
        """Return how many of `tokens` an entry has at its start, and the entry that has most."""
        best, found = 0, None
        for number, entry in self._entries.items():
            if entry.group == group and (length := common(entry.tokens, tokens)) > best:
                best, found = length, number
        if found is None:
            return 0, None
        self._entries.move_to_end(found)
        return best, self._entries[found]

    def put(self, entry: Entry, most: int) -> None:
        """Keep `entry`, and of the others what fits into `most` positions with it.

        Entries that are the start of this one go: it serves as well.
        """
        starts = [
            number
            for number, other in self._entries.items()
            if other.group == entry.group
            and len(other.tokens) <= len(entry.tokens)
            and common(other.tokens, entry.tokens) == len(other.tokens)
        ]
        for number in starts:
            self._drop(number)
        self.shrink(most - len(entry.tokens))
        if len(entry.tokens) <= most:
            self._number += 1
            self._entries[self._number] = entry
            self.positions += len(entry.tokens)

    def has(self, group: str | None, tokens: Tokens) -> bool:
        """Return whether an entry begins with all of `tokens`."""
        return self.find(group, tokens)[0] == len(tokens)

    def shrink(self, most: int) -> None:
        """Drop entries until at most `most` positions are left."""
        while self._entries and self.positions > most:
            self._drop(next(iter(self._entries)))

    def _drop(self, number: int) -> None:
        self.positions -= len(self._entries.pop(number).tokens)
