"""What the engine does next, as pure functions of what it knows about its sequences."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

CHUNK = 512
"""Most tokens of a prompt that the CPU reads at once: no slower than all at once, and needs less
memory."""

SHARED_CHUNK = 128
"""The same while others generate, who wait meanwhile."""


@dataclass(frozen=True)
class Job:
    """A sequence that has a place in the caches.

    `unread` is how many tokens of its prompt are still to be read, 0 once it generates. Sequences
    of one `group` can make a step together. `served` is the number of the turn in which it last
    read or made a step, or came: of those that wait, the smallest has waited longest.
    """

    key: int
    group: str | None
    unread: int
    served: int


@dataclass(frozen=True)
class Read:
    """Read the next `count` tokens of a prompt."""

    key: int
    count: int


@dataclass(frozen=True)
class Step:
    """Generate the next token of each of these sequences."""

    keys: tuple[int, ...]


def next_action(jobs: Collection[Job], owed: float, longest: int | None = CHUNK) -> Read | Step:
    """Return what to do next for `jobs`, of which there is at least one.

    Prompts are read in turn, a part of at most `longest` tokens each (None: as a whole). Reading
    takes turns with steps, in which all sequences that generate take part: `owed` is the time that
    reading has had and steps have not, and while there is any, steps go first. So each gets half of
    the time, and nobody waits for the whole of another's prompt.
    """
    readers = [job for job in jobs if job.unread]
    steppers = [job for job in jobs if not job.unread]
    if steppers and (owed > 0 or not readers):
        group = min(steppers, key=lambda job: (job.served, job.key)).group
        return Step(tuple(sorted(job.key for job in steppers if job.group == group)))
    reader = min(readers, key=lambda job: (job.served, job.key))
    if longest is not None and steppers:
        longest = min(longest, SHARED_CHUNK)
    return Read(reader.key, part(reader.unread, longest))


def part(unread: int, longest: int | None) -> int:
    """Return the length of the next part of `unread` tokens, none longer than `longest`.

    The parts are nearly equal: a rest of one token would be computed by another kernel than the
    others.

    >>> part(513, 512), part(256, 512), part(1030, 512)
    (257, 256, 344)
    """
    if longest is None:
        return unread
    return -(-unread // -(-unread // longest))


@dataclass(frozen=True)
class Need:
    """The most positions that a sequence may need, and whose steps it can share."""

    group: str | None
    positions: int


@dataclass(frozen=True)
class Capacity:
    """What the caches may hold: `positions` in all, of `rows` sequences at most.

    `rectangular`: the rows of a group are as long as the longest of them.
    """

    rows: int
    positions: int
    rectangular: bool

    def holds(self, needs: Sequence[Need]) -> bool:
        """Return whether there is room for all of `needs`."""
        return len(needs) <= self.rows and self.positions_of(needs) <= self.positions

    def positions_of(self, needs: Sequence[Need]) -> int:
        """Return the positions that buffers for all of `needs` have at most."""
        if not self.rectangular:
            return sum(need.positions for need in needs)
        groups: dict[str | None, list[int]] = {}
        for need in needs:
            groups.setdefault(need.group, []).append(need.positions)
        return sum(len(lengths) * max(lengths) for lengths in groups.values())


def admit(waiting: Mapping[int, Need], held: Sequence[Need], capacity: Capacity) -> list[int]:
    """Return which of `waiting` get a place beside `held`: in their order, as many as fit.

    Nobody is passed over for a smaller one, who might then be followed by others for ever.
    """
    admitted: list[int] = []
    needs = list(held)
    for key, need in waiting.items():
        needs.append(need)
        if not capacity.holds(needs):
            break
        admitted.append(key)
    return admitted
