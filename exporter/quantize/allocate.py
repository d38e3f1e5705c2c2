"""Shares out a budget of bytes among matrices, where each byte saves the most loss.

Each matrix has a few ways to be stored, with the bytes and the loss of each. Only those on the
lower convex hull of (bytes, loss) matter. All matrices start at their smallest; the steps along all
hulls are then taken in the order of loss saved per byte until the next one does not fit. More bytes
never give more loss, since a larger budget takes the same steps and then more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llama_onnx.exporter.model.storage import RowBlocks

Losses = Mapping[str, Mapping[RowBlocks, float]]
"""What each storage of a tensor costs, by the tensor's name."""


@dataclass(frozen=True)
class Choice:
    """One way to store a matrix: its bytes, and the loss it is predicted to cost."""

    storage: RowBlocks
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Unit:
    """A matrix of the graph, made of the tensors `sources`, and its choices."""

    name: str
    sources: tuple[str, ...]
    choices: tuple[Choice, ...]


Allocation = Mapping[str, Choice]
"""What each unit gets, by its name."""


@dataclass(frozen=True)
class _Step:
    unit: str
    choice: Choice
    nbytes: int
    gain: float  # loss saved per byte


def smallest(units: Sequence[Unit]) -> Allocation:
    """Return the choice of fewest bytes for each of `units`.

    >>> small, big = Choice(RowBlocks(4, 32), 10, 2.0), Choice(RowBlocks(8, 32), 20, 0.5)
    >>> smallest([Unit("m", ("m.weight",), (big, small))])["m"].nbytes
    10
    """
    return {unit.name: hull(unit.choices)[0] for unit in units}


def within_bytes(units: Sequence[Unit], nbytes: int) -> Allocation:
    """Return what loses least in at most `nbytes`; `smallest` if that is more already."""
    spent = _bytes(smallest(units))

    def fits(step: _Step, _: float) -> bool:
        nonlocal spent
        spent += step.nbytes
        return spent <= nbytes

    return _climb(units, fits)


def within_loss(units: Sequence[Unit], loss: float) -> Allocation:
    """Return the first allocation, of those that growing budgets give, that loses at most `loss`;
    the one that loses least if none does."""
    return _climb(units, lambda _, before: before > loss)


def total_loss(allocation: Allocation) -> float:
    """Return the sum of the losses.

    They are means per token of the model's KL divergence, to the second order, so they add up.
    """
    return sum(choice.loss for choice in allocation.values())


def hull(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Return the choices on the lower convex hull, by growing bytes and falling loss."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if found and choice.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-1], choice):
            found.pop()
        found.append(choice)
    return tuple(found)


def _climb(units: Sequence[Unit], take: Callable[[_Step, float], bool]) -> Allocation:
    """Take steps while `take` wants the next one, given the loss before it."""
    found = dict(smallest(units))
    loss = total_loss(found)
    for step in _steps(units):
        if not take(step, loss):
            break
        loss += step.choice.loss - found[step.unit].loss
        found[step.unit] = step.choice
    return found


def _steps(units: Sequence[Unit]) -> list[_Step]:
    found = []
    for unit in units:
        on_hull = hull(unit.choices)
        for before, after in pairwise(on_hull):
            nbytes = after.nbytes - before.nbytes
            found.append(_Step(unit.name, after, nbytes, _slope(before, after)))
    # A stable sort: the steps of one unit stay in order, since gains fall along its hull.
    return sorted(found, key=lambda step: -step.gain)


def _slope(before: Choice, after: Choice) -> float:
    """Return the loss saved per byte."""
    return (before.loss - after.loss) / (after.nbytes - before.nbytes)


def _bytes(allocation: Allocation) -> int:
    return sum(choice.nbytes for choice in allocation.values())
