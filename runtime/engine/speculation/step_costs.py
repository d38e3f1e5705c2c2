"""What a step of several positions costs on this machine, measured, and what drafts may cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

MOST_DRAFTED = 16
"""Tokens in one step."""

_POSITIONS = MOST_DRAFTED + 1

_SAMPLES, _TRUSTED = 7, 3
"""Latest measurements of a number of positions that count, and how many make it trusted."""

_OLD = 512
"""Steps after which a measurement no longer counts: the machine, and the text's length, change."""

_GUESS = 0.25
"""Share of a step that one more position is taken to cost until the first measurement."""

_SHARE = 0.02
"""Of the time of steps, what drafts that fail may cost."""

_START, _MOST = 2.0, 4.0
"""Steps that drafts may cost at once: in the beginning, and after drafts that paid."""

_UNLIKELY = 0.02
"""Chance of a token from which on no more are drafted."""

_WORTH = 1.05
"""A step with drafts must promise more tokens than this in the time of a plain step's one."""


class StepCosts:
    """How long steps of one sequence take, by their positions: medians of late measurements."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._number = self._plain_at = 0
        self._table: Sequence[float] | None = None

    def note(self, positions: int, seconds: float) -> None:
        """Take note of what a step took."""
        self._number += 1
        self._samples.setdefault(positions, deque(maxlen=_SAMPLES)).append((self._number, seconds))
        self._table = None
        if positions == 1:
            self._plain_at = self._number

    @property
    def since_plain(self) -> int:
        """How many steps ago a plain step was measured."""
        return self._number - self._plain_at

    @property
    def plain(self) -> float | None:
        """Seconds of a step of one position; None until it was measured three times."""
        return self._median(1) if len(self._samples.get(1, ())) >= _TRUSTED else None

    def table(self) -> Sequence[float]:
        """Return what steps of 0, 1, 2 ... positions cost, in plain steps.

        A number of positions that was measured less than three times costs no more than those
        beside it suggest: one slow measurement must not rule it out.
        """
        if self._table is None:
            self._table = self._relative()
        return self._table

    def charge(self, positions: int, seconds: float) -> float:
        """Return what a step that was noted costs, in plain steps: the median once there is one.

        A machine that was busy for a moment is not the drafts' fault: a plain step would have been
        as slow. Until there is a median, no step costs more than one for each position.
        """
        plain = self.plain
        assert plain, "plain steps were not measured"
        samples = self._samples.get(positions, ())
        if len(samples) >= _TRUSTED:
            return median(seconds for _, seconds in samples) / plain
        return min(seconds / plain, positions)

    def _median(self, positions: int) -> float | None:
        samples = self._samples.get(positions, ())
        late = self._late(positions)
        return median(late or [seconds for _, seconds in samples]) if samples else None

    def _late(self, positions: int) -> list[float]:
        """Return the measurements that are not too old to count."""
        samples = self._samples.get(positions, ())
        return [seconds for number, seconds in samples if self._number - number < _OLD]

    def _relative(self) -> Sequence[float]:
        plain = self.plain
        assert plain, "no plain step was measured"
        trusted, tried = {1: 1.0}, dict[int, float]()
        for positions in sorted(self._samples):
            late = self._late(positions)
            if late and positions > 1:
                known = trusted if len(late) >= _TRUSTED else tried
                known[positions] = median(late) / plain
        table = _between(trusted)
        for positions, cost in tried.items():
            table[positions] = min(table[positions], cost)
        return table


def _between(known: dict[int, float]) -> list[float]:
    """Return costs by positions, on straight lines through the `known` ones."""
    points = sorted(known.items())
    last, most = points[-1]
    slope = (most - 1) / (last - 1) if last > 1 else _GUESS
    points.append((max(_POSITIONS, last + 1), most + slope * (max(_POSITIONS, last + 1) - last)))
    table = [0.0]
    for (start, low), (end, high) in pairwise(points):
        table += [low + (high - low) * (p - start) / (end - start) for p in range(start, end)]
    return [*table, points[-1][1]]


class Account:
    """What drafts may still cost, in plain steps; so they cost 2 % of the time at most, and two
    steps, over the life of an engine, whatever the text."""

    def __init__(self) -> None:
        self.balance = _START

    def earn(self) -> None:
        """Add the share of a plain step."""
        self.balance = min(_MOST, self.balance + _SHARE)

    def settle(self, tokens: int, cost: float) -> None:
        """Count a step with drafts that gave `tokens` for `cost` plain steps."""
        self.balance = min(_MOST, self.balance + tokens - cost)


@dataclass(frozen=True)
class Plan:
    """How many tokens to draft, and how many tokens that promises in the time of a plain step."""

    count: int
    promise: float


def plan(
    chances: Iterable[float], table: Sequence[float], balance: float, drafting: float = 0.0
) -> Plan:
    """Return the number of tokens to draft that promises most, 0 if none pays.

    Each token comes true with its chance if those before did. `drafting` is what drafting a token
    costs, in plain steps. No more are drafted than `balance` can bear if none of them comes true.

    >>> plan([0.9] * 4, [0, 1, 1.2, 1.4, 1.6, 1.8], 4.0).count
    4
    >>> plan([0.1] * 4, [0, 1, 1.2, 1.4, 1.6, 1.8], 4.0).count
    0
    """
    best = Plan(0, _WORTH)
    expected = survives = 1.0
    for count, chance in enumerate(chances, 1):
        survives *= chance
        if survives < _UNLIKELY:
            break
        expected += survives
        cost = table[1 + count] + drafting * count
        if cost - 1 <= balance and expected / cost > best.promise:
            best = Plan(count, expected / cost)
    return best
