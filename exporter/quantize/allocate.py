"""Shares out a budget of bytes among matrices so that as little as possible is lost, or, within a
largest loss, spends as few bytes or as little time as possible.

Each matrix has a few ways to be stored, with the bytes, the time and the loss of each; one is taken
for every matrix. This is the multiple-choice knapsack problem, solved by dynamic programming over
what is spent (Pisinger, 1995, doi:10.1016/0377-2217(95)00015-I): with one matrix after another, the
least loss for each number of bytes follows from that without the matrix. More bytes never give more
loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.model.storage import RowBlocks

Losses = Mapping[str, Mapping[RowBlocks, float]]
"""What each storage of a tensor costs, by the tensor's name."""

_GRAINS = 1 << 17
"""Most sums that are told apart: what a matrix takes above its least is rounded up to a grain,
which for 225 matrices leaves at most 0.2 % of what a budget can add unused."""


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: its bytes, the loss it is predicted to cost, and the time it takes
    to multiply by it, in a unit that all choices share."""

    storage: RowBlocks
    nbytes: int
    loss: float
    time: int = 0


Spending = Callable[[Choice], int]
"""What of a choice is to be kept small: its bytes, or its time."""

BYTES: Spending = attrgetter("nbytes")
TIME: Spending = attrgetter("time")


@dataclass(frozen=True)
class Unit:
    """A matrix of the graph, made of the tensors `sources`, and its choices."""

    name: str
    sources: tuple[str, ...]
    choices: tuple[Choice, ...]


Allocation = Mapping[str, Choice]
"""What each unit gets, by its name."""


def smallest(units: Sequence[Unit]) -> Allocation:
    """Return the choice of fewest bytes for each of `units`.

    >>> small, big = Choice(RowBlocks(4, 32), 10, 2.0), Choice(RowBlocks(8, 32), 20, 0.5)
    >>> smallest([Unit("m", ("m.weight",), (big, small))])["m"].nbytes
    10
    """
    return {unit.name: _in_order(unit, BYTES)[0] for unit in units}


def within_bytes(units: Sequence[Unit], nbytes: int) -> Allocation:
    """Return what loses least in at most `nbytes`; `smallest` if that is more already.

    >>> small, big = Choice(RowBlocks(4, 32), 10, 2.0), Choice(RowBlocks(8, 32), 20, 0.5)
    >>> within_bytes([Unit("m", ("m.weight",), (big, small))], 25)["m"].nbytes
    20
    """
    table = _table(units, BYTES)
    room = nbytes - sum(choice.nbytes for choice in smallest(units).values())
    grains = min(max(room, 0) // table.grain, len(table.losses) - 1)
    return _allocation(units, table, grains)


def within_loss(units: Sequence[Unit], loss: float, spending: Spending = BYTES) -> Allocation:
    """Return what spends least of all that loses at most `loss`; what loses least if nothing does.

    >>> small = Choice(RowBlocks(4, 32), nbytes=10, loss=0.5, time=9)
    >>> fast = Choice(RowBlocks(8, 64), nbytes=20, loss=0.1, time=7)
    >>> within_loss([Unit("m", ("m.weight",), (small, fast))], 0.5, TIME)["m"].storage.bits
    8
    """
    table = _table(units, spending)
    enough = table.losses <= max(loss, table.losses[-1])
    return _allocation(units, table, int(enough.argmax()))


def total_loss(allocation: Allocation) -> float:
    """Return the sum of the losses.

    They are means per token of the model's KL divergence, to the second order, so they add up.
    """
    return sum(choice.loss for choice in allocation.values())


@dataclass(frozen=True)
class _Table:
    """The least `losses` for 0, 1, 2, ... grains of `spending` above the least that can be spent,
    and for each unit which choice that takes, with as many grains for it and those before it."""

    spending: Spending
    grain: int
    losses: npt.NDArray[np.float64]
    picks: Sequence[npt.NDArray[np.uint8]]


def _table(units: Sequence[Unit], spending: Spending) -> _Table:
    ordered = [_in_order(unit, spending) for unit in units]
    above = [[spending(choice) - spending(ways[0]) for choice in ways] for ways in ordered]
    most = sum(sizes[-1] for sizes in above)
    grain = max(math.gcd(*(size for sizes in above for size in sizes)), -(-most // _GRAINS), 1)
    losses = np.zeros(sum(-(-sizes[-1] // grain) for sizes in above) + 1)
    picks = []
    for ways, sizes in zip(ordered, above, strict=True):
        least, picked = np.full_like(losses, np.inf), np.zeros(len(losses), np.uint8)
        for index, (choice, size) in enumerate(zip(ways, sizes, strict=True)):
            grains = -(-size // grain)
            found = losses[: len(losses) - grains] + choice.loss
            better = found < least[grains:]
            least[grains:][better], picked[grains:][better] = found[better], index
        losses = least
        picks.append(picked)
    return _Table(spending, grain, losses, picks)


def _allocation(units: Sequence[Unit], table: _Table, grains: int) -> Allocation:
    found = dict(_backwards(units, table, grains))
    return {unit.name: found[unit.name] for unit in units}


def _backwards(units: Sequence[Unit], table: _Table, grains: int) -> Iterator[tuple[str, Choice]]:
    for unit, picked in zip(reversed(units), reversed(table.picks), strict=True):
        ways, spending = _in_order(unit, table.spending), table.spending
        choice = ways[picked[grains]]
        yield unit.name, choice
        grains -= -(-(spending(choice) - spending(ways[0])) // table.grain)


def _in_order(unit: Unit, spending: Spending) -> Sequence[Choice]:
    return sorted(unit.choices, key=lambda choice: (spending(choice), choice.loss))
