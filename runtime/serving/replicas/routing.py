"""Which replica answers a request: the one that has read its beginning, unless it has much to do.

The keys and values of a conversation are in the process that answered it, so its next turn is fast
there alone. A request is known by hashes of its beginnings: after each message of a conversation,
or after each part of a long prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PART = 512
"""Characters of a prompt from one beginning to the next; of token ids, as many numbers."""

MOST_BEGINNINGS = 256
"""Of a request: what comes after them is not looked at."""

REMEMBERED = 16_384
"""Beginnings that are remembered for each replica; the oldest are forgotten."""

WORTH = 1000
"""Characters that a replica has read which are worth one more answer that it has to do."""

MOST_CHOICES = 16

Beginning = tuple[bytes, int]
"""The hash of a beginning, and its characters."""


@dataclass(frozen=True)
class Wanted:
    """What routing knows of a request: how many answers it asks for, and its beginnings, the
    shortest first."""

    places: int = 1
    beginnings: tuple[Beginning, ...] = ()


def read_wanted(body: bytes) -> Wanted:
    """Return what routing needs of a request's body; a replica will say what is wrong with it."""
    try:
        fields = json.loads(body)
        if isinstance(fields, dict):
            return Wanted(_places(fields), tuple(_beginnings(fields)))
    except (ValueError, RecursionError):
        pass
    return Wanted()


def _places(fields: Mapping[str, Any]) -> int:
    choices, prompt = fields.get("n"), fields.get("prompt")
    count = choices if isinstance(choices, int) and 1 <= choices <= MOST_CHOICES else 1
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return count * len(prompt) if several and isinstance(prompt, list) else count


def _beginnings(fields: Mapping[str, Any]) -> Iterator[Beginning]:
    """Yield the beginnings; what is read before them, such as tools, is part of each."""
    before = [fields.get(key) for key in ("model", "tools", "chat_template_kwargs", "instructions")]
    state, length = hashlib.sha256(_text(before)), 0
    for number, part in enumerate(_parts(fields)):
        if number == MOST_BEGINNINGS:
            return
        state.update(hashlib.sha256(part).digest())
        length += len(part)
        yield state.digest()[:16], length


def _parts(fields: Mapping[str, Any]) -> Iterable[bytes]:
    for key in ("messages", "input"):
        if isinstance(messages := fields.get(key), list):
            return map(_text, messages)
    whole = fields.get("prompt") or fields.get("input") or ""
    if isinstance(whole, list) and whole and not isinstance(whole[0], int):
        whole = whole[0]  # the other prompts are answered where the first is
    if not isinstance(whole, str | list):
        return ()
    return (_text(whole[at : at + PART]) for at in range(0, len(whole), PART))


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


class Seen:
    """The beginnings that a replica has read."""

    def __init__(self) -> None:
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        """How many there are."""
        return len(self._hashes)

    def add(self, beginnings: Iterable[Beginning]) -> None:
        """Remember these as the newest."""
        for digest, _ in beginnings:
            self._hashes[digest] = None
            self._hashes.move_to_end(digest)
        while len(self._hashes) > REMEMBERED:
            self._hashes.popitem(last=False)

    def known(self, beginnings: Sequence[Beginning]) -> int:
        """Return the characters of the longest beginning that was read, 0 without any."""
        for digest, length in reversed(beginnings):
            if digest in self._hashes:
                return length
        return 0


@dataclass(frozen=True)
class Candidate:
    """A replica that could answer: what it has to do, what it knows of the request, and how many
    it has answered."""

    number: int
    load: int
    known: int = 0
    answered: int = 0


def choose(candidates: Sequence[Candidate], places: int, rows: int) -> int | None:
    """Return the number of the replica that answers next, None if none has room.

    The one that knows most of the request, unless it has more to do than the idlest by one answer
    and one more for each `WORTH` characters, or by half of its rows. A request for more answers
    than there are rows has a replica of its own.
    """
    free = [one for one in candidates if one.load == 0 or one.load + places <= rows]
    if not free:
        return None
    idlest = min(free, key=lambda one: (one.load, -one.known, one.answered, one.number))
    knows = min(free, key=lambda one: (-one.known, one.load, one.answered, one.number))
    bound = min(1 + knows.known // WORTH, max(1, rows // 2))
    near = knows.known > 0 and knows.load - idlest.load <= bound
    return (knows if near else idlest).number
