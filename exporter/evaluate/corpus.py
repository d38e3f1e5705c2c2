"""A corpus, a UTF-8 text of any size, cut into shards that are measured apart.

The cuts depend on the text alone: whoever measures the shards, in whatever order, measures the
same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llama_onnx.targets.errors import UsageError, describe_reason

SHARD_BYTES = 16 << 10
"""A shard ends at the first end of a line after so many bytes: some 4,000 tokens."""

_LONGEST_LINE = SHARD_BYTES


@dataclass(frozen=True)
class Shard:
    """The bytes of a corpus from `start` to `end`."""

    start: int
    end: int

    def read(self, path: Path) -> str:
        """Return the text; raise `UsageError` if it is not UTF-8."""
        with path.open("rb") as file:
            file.seek(self.start)
            content = file.read(self.end - self.start)
        try:
            return content.decode("utf-8-sig" if self.start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 text at byte {self.start + error.start:,}: convert it first."
            ) from None


@dataclass(frozen=True)
class Corpus:
    """A text, its `sha256` and its `shards` in order."""

    path: Path
    sha256: str
    shards: tuple[Shard, ...]


def open_corpus(path: Path) -> Corpus:
    """Read the whole text once, to cut it and to know it again.

    Raises `UsageError` for a file that is empty or cannot be read.
    """
    digest, shards, start, end = hashlib.sha256(), [], 0, 0
    try:
        with path.open("rb") as file:
            for length in _lines(file, digest.update):
                end += length
                if end - start >= SHARD_BYTES:
                    shards.append(Shard(start, end))
                    start = end
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {describe_reason(error)}.") from None
    if end > start:
        shards.append(Shard(start, end))
    if not shards:
        raise UsageError(f"{path} is empty: give a text.")
    return Corpus(path, digest.hexdigest(), tuple(shards))


def _lines(file: BinaryIO, seen: Callable[[bytes], object]) -> Iterator[int]:
    """Yield the length of each line, or of a part of a long one that ends with a character."""
    while block := file.readline(_LONGEST_LINE):
        if not block.endswith(b"\n") and (rest := _unfinished(block)):
            file.seek(-rest, 1)
            block = block[:-rest]
        seen(block)
        yield len(block)


def _unfinished(block: bytes) -> int:
    """Return how many bytes at the end of `block` begin a character that goes on after it; 0 at
    the end of a file that was cut short, or where it is not UTF-8 at all."""
    for count in range(1, min(4, len(block))):
        byte = block[-count]
        if byte >= 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return count if wanted > count else 0
        if byte < 0x80:
            return 0
    return 0
