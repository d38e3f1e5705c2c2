"""Turns a budget of bytes, or of loss, into a storage for each matrix."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from llama_onnx.exporter.graph.kernel_times import chat_time
from llama_onnx.exporter.graph.names import HEAD
from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.model.recipe import Recipe, small_storage
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.packaging.goal import Goal
from llama_onnx.exporter.packaging.options import Minimize
from llama_onnx.exporter.quantize.allocate import (
    BYTES,
    TIME,
    Allocation,
    Choice,
    Losses,
    Unit,
    smallest,
    total_loss,
    within_bytes,
    within_loss,
)
from llama_onnx.targets.errors import UsageError

CANDIDATES: Mapping[Minimize, Sequence[tuple[int, int]]] = {
    "size": ((2, 64), (2, 32), (4, 64), (4, 32), (4, 16), (8, 64)),
    "time": ((2, 128), (4, 128), (4, 64), (8, 128), (8, 64)),
}
"""Bits and block size of the storages to choose from, by what is to be small. Where that is the
time, 4 bits in smaller blocks take longer than 8 bits and lose more (see KERNEL_TIMES)."""

PLAIN = (4, 64)
"""What others are compared with: 4 bits in a block size that both lists have."""

_ATTEMPTS = 8

Chosen = Mapping[str, RowBlocks]
"""A storage for each tensor."""


class Planned(Protocol):
    """What has to be known of a plan to compare it with a goal."""

    @property
    def recipe(self) -> Recipe:
        """How each matrix is stored."""
        ...

    @property
    def slots(self) -> Sequence[Slot]:
        """The matrices of the graph."""
        ...

    @property
    def data_bytes(self) -> int:
        """Size of the weights' file."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Its bits per parameter of the model."""
        ...


P = TypeVar("P", bound=Planned)


@dataclass(frozen=True)
class Decision:
    """What each matrix got, and the loss that is predicted."""

    units: Sequence[Unit]
    allocation: Allocation

    @property
    def predicted_kl(self) -> float:
        """The mean KL divergence from the original that is predicted."""
        return total_loss(self.allocation)

    def to_json(self) -> dict[str, Any]:
        """Return it for scripts: for each matrix its storage, bytes, predicted loss, and the time
        that `kernel_times` has for it, with those of the others it could have had."""
        return {
            "predicted_kl": round(self.predicted_kl, 5),
            "matrices": {
                unit.name: {**_choice(self.allocation[unit.name]), "others": _others(unit, self)}
                for unit in self.units
            },
        }


def candidates(slot: Slot, recipe: Recipe, goal: Goal) -> tuple[RowBlocks, ...]:
    """Return the storages to choose from for the matrix of `slot`; none if it has no codes, or
    keeps those of its source."""
    if not isinstance(slot.storage, RowBlocks) or slot.keeps_codes:
        return ()
    found = []
    for bits, size in CANDIDATES[goal.minimize]:
        if bits == 2 and (slot.gathered or not recipe.operators.two_bits):
            continue  # no operator gathers codes of 2 bits
        storage = small_storage(RowBlocks(bits, size, scales=recipe.activations), recipe.operators)
        assert isinstance(storage, RowBlocks)
        found.append(storage)
    return tuple(found)


def surveyed(slots: Sequence[Slot]) -> list[Slot]:
    """Return the matrices whose loss a text shows: all but an embedding beside a head of its own,
    which only maps tokens to rows."""
    separate = any(slot.name == HEAD for slot in slots)
    return [slot for slot in slots if not (slot.gathered and separate)]


def check_possible(plan: P, goal: Goal, again: Callable[[Chosen], P]) -> None:
    """Raise `UsageError` if the smallest storage of all matrices is larger than `goal` allows."""
    names = {
        name: dict.fromkeys(candidates(slot, plan.recipe, goal), 0.0)
        for slot in surveyed(plan.slots)
        for name in slot.sources
    }
    least = again(_chosen(units := _units(plan, names, goal), smallest(units)))
    if goal.nbytes is not None and least.data_bytes > goal.nbytes:
        raise _too_small(goal, least)


def decide(plan: P, losses: Losses, goal: Goal, again: Callable[[Chosen], P]) -> tuple[P, Decision]:
    """Return the plan that meets `goal`, and what each matrix got.

    `again` returns the plan with other storages. Raises `UsageError` for a goal that cannot be met,
    with the least that can.
    """
    units = _units(plan, losses, goal)
    if goal.max_kl is not None:
        return _within_kl(units, goal, again)
    assert goal.nbytes is not None, "a goal has one or the other"
    room = goal.nbytes
    for _ in range(_ATTEMPTS):
        allocation = within_bytes(units, room - _others_bytes(plan, units))
        found = again(_chosen(units, allocation))
        if found.data_bytes <= goal.nbytes:
            return found, Decision(units, allocation)
        if allocation == smallest(units):
            break
        room -= found.data_bytes - goal.nbytes  # padding between initializers
    raise _too_small(goal, again(_chosen(units, smallest(units))))


def _too_small(goal: Goal, least: Planned) -> UsageError:
    return UsageError(
        f"--budget {goal.text} is too small: the least that this model can be stored in is "
        f"{_least(least)}."
    )


def _within_kl(
    units: Sequence[Unit], goal: Goal, again: Callable[[Chosen], P]
) -> tuple[P, Decision]:
    assert goal.max_kl is not None, "there is a limit"
    spending = TIME if goal.minimize == "time" else BYTES
    decision = Decision(units, within_loss(units, goal.max_kl, spending))
    if decision.predicted_kl > goal.max_kl:
        raise UsageError(
            f"--max-kl {goal.max_kl:g} cannot be met: with all matrices in 8 bits the predicted KL "
            f"divergence is {_up(decision.predicted_kl)}."
        )
    found = again(_chosen(units, decision.allocation))
    if goal.nbytes is not None and found.data_bytes > goal.nbytes:
        raise UsageError(
            f"--budget {goal.text} is too small for --max-kl {goal.max_kl:g}, which takes "
            f"{_least(found)}."
        )
    return found, decision


def _units(plan: Planned, losses: Losses, goal: Goal) -> list[Unit]:
    found = []
    for slot in plan.slots:
        if slot.name not in goal.fixed and all(name in losses for name in slot.sources):
            ways = [_way(slot, storage, losses) for storage in candidates(slot, plan.recipe, goal)]
            if ways:
                found.append(Unit(slot.name, slot.sources, tuple(ways)))
    return found


def _way(slot: Slot, storage: RowBlocks, losses: Losses) -> Choice:
    nbytes = replace(slot, storage=storage).nbytes
    loss = sum(losses[name][storage] for name in slot.sources)
    rows, columns = slot.shape
    time = chat_time(rows, columns, storage.bits, storage.block_size)
    return Choice(storage, nbytes, loss, time)


def _others_bytes(plan: Planned, units: Sequence[Unit]) -> int:
    """Return the bytes of what has no choice."""
    chosen = {unit.name for unit in units}
    return sum(slot.nbytes for slot in plan.slots if slot.name not in chosen)


def _chosen(units: Sequence[Unit], allocation: Allocation) -> Chosen:
    return {name: allocation[unit.name].storage for unit in units for name in unit.sources}


def _least(plan: Planned) -> str:
    bits = math.ceil(100 * plan.bits_per_weight) / 100
    return f"{bits:.2f}bpw ({math.ceil(plan.data_bytes / 1e4) / 100:.2f}MB)"


def _up(value: float) -> str:
    return f"{math.ceil(value * 1e5) / 1e5:.5f}"


def _choice(choice: Choice) -> dict[str, Any]:
    storage = choice.storage
    return {
        "bits": storage.bits,
        "block_size": storage.block_size,
        "zero_points": storage.zero_points,
        "bytes": choice.nbytes,
        "nanoseconds": choice.time,
        "predicted_kl": float(f"{choice.loss:.3g}"),
    }


def _others(unit: Unit, decision: Decision) -> list[dict[str, Any]]:
    got = decision.allocation[unit.name]
    return [_choice(choice) for choice in unit.choices if choice is not got]


@dataclass(frozen=True)
class Kind:
    """Matrices that differ only by their layer: how many have each bits and block size, what they
    take and are predicted to lose, and the loss and time if all had 4 bits in blocks of 64."""

    name: str
    storages: Sequence[tuple[tuple[int, int], int]]
    nbytes: int
    loss: float
    plain_loss: float
    time: int
    plain_time: int


def summarize(decision: Decision) -> list[Kind]:
    """Return what each kind of matrix got."""
    kinds: dict[str, list[Unit]] = {}
    for unit in decision.units:
        kinds.setdefault(re.sub(r"^model\.(layers\.\d+\.)?", "", unit.name), []).append(unit)
    found = []
    for name, units in kinds.items():
        got = [decision.allocation[unit.name] for unit in units]
        ways = Counter(_form(choice.storage) for choice in got)
        plain = [c for u in units for c in u.choices if _form(c.storage) == PLAIN]
        found.append(
            Kind(
                name,
                sorted(ways.items()),
                nbytes=sum(choice.nbytes for choice in got),
                loss=sum(choice.loss for choice in got),
                plain_loss=sum(choice.loss for choice in plain),
                time=sum(choice.time for choice in got),
                plain_time=sum(choice.time for choice in plain),
            )
        )
    return found


def _form(storage: RowBlocks) -> tuple[int, int]:
    return storage.bits, storage.block_size
