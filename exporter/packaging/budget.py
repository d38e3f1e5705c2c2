"""Turns a budget of bytes, or of loss, into a storage for each matrix."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from llama_onnx.exporter.graph.kernel_times import chat_time
from llama_onnx.exporter.graph.names import EMBEDDING, HEAD
from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.model.recipe import Recipe, small_storage
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.packaging.options import Minimize, Options
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
from llama_onnx.exporter.quantize.registry import CALIBRATED
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.sizes import parse_size

CANDIDATES: Mapping[Minimize, Sequence[tuple[int, int]]] = {
    "size": ((2, 64), (2, 32), (4, 64), (4, 32), (4, 16), (8, 64)),
    "time": ((4, 128), (4, 64), (4, 32), (8, 128), (8, 64)),
}
"""Bits and block size of the storages to choose from, by what is to be small."""

PLAIN = (4, 64)
"""What others are compared with: the smallest of 4 bits."""

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
class Goal:
    """What a package may take, and what it may lose; with a largest loss, `minimize` says what is
    as small as that allows. `text` is the budget as the user gave it; `fixed` are the matrices
    whose storage the user chose."""

    text: str | None
    nbytes: int | None
    max_kl: float | None
    fixed: frozenset[str] = frozenset()
    minimize: Minimize = "size"


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
        """Return it for scripts: for each matrix its storage, bytes and predicted loss, and that of
        the others it could have had."""
        return {
            "predicted_kl": round(self.predicted_kl, 5),
            "matrices": {
                unit.name: {**_choice(self.allocation[unit.name]), "others": _others(unit, self)}
                for unit in self.units
            },
        }


def goal_of(options: Options, parameters: int) -> Goal | None:
    """Return the goal that `--budget` and `--max-kl` set; None without them.

    Raises `UsageError` for what is no budget.
    """
    budget, max_kl, minimize = options.budget, options.max_kl, options.minimize
    if minimize == "time" and max_kl is None:
        raise UsageError(
            "--minimize time makes a package as fast as a largest KL divergence allows: add "
            "--max-kl, such as 0.05."
        )
    if budget is None and max_kl is None:
        return None
    if options.recipe is not None:
        raise UsageError(
            "--recipe says how each matrix is stored, which is what --budget and --max-kl decide: "
            "pass only one."
        )
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
        raise UsageError(f"--max-kl {max_kl} is not a number above 0, such as 0.05.")
    nbytes = None if budget is None else budget_bytes(budget, parameters)
    fixed = {EMBEDDING: options.embedding, HEAD: options.head}
    names = frozenset(name for name in fixed if fixed[name])
    return Goal(budget, nbytes, max_kl, names, minimize)


def check_goal(goal: Goal | None, recipe: Recipe) -> None:
    """Raise `UsageError` if there is nothing that `goal` could decide."""
    if goal is None:
        return
    what = "a budget" if goal.text else "a largest KL divergence"
    if recipe.linear.name != "int4":
        raise UsageError(
            f"{what} decides how codes are stored, and a package of {recipe.precision} leaves no "
            "choice: use --precision int4."
        )
    if recipe.operators.standard:
        raise UsageError(
            f"{what} needs an operator that reads codes of several sizes, which the target does "
            "not have: leave it out."
        )
    if recipe.source_codes:
        raise UsageError(
            f"{what} decides how matrices are stored, and the source is quantized already: leave "
            "it out, and its codes are kept."
        )
    if recipe.quantizer not in CALIBRATED:
        raise UsageError(
            f"{what} needs a quantizer that reads a text, not {recipe.quantizer}: leave out "
            f"--quantizer, or use {', '.join(CALIBRATED)}."
        )


def budget_bytes(text: str, parameters: int) -> int:
    """Return the bytes of a budget given as `text`, for a model of `parameters`.

    >>> budget_bytes("4.4bpw", 1000), budget_bytes("3.8GB", 1000)
    (550, 3800000000)
    """
    bits = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?bpw", text.strip())
    size = int(float(bits[1]) * parameters / 8) if bits else parse_size(text)
    if not size:
        raise UsageError(
            f"--budget {text!r} is neither bits per weight, such as 4.4bpw, nor a size, such as "
            "3.8GB."
        )
    return size


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


def check_possible(plan: P, goal: Goal, again: Callable[[Chosen], P]) -> None:
    """Raise `UsageError` if the smallest storage of all matrices is larger than `goal` allows."""
    names = {
        name: dict.fromkeys(candidates(slot, plan.recipe, goal), 0.0)
        for slot in plan.slots
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
            ways = [
                _way(slot, storage, losses, plan.recipe)
                for storage in candidates(slot, plan.recipe, goal)
            ]
            if ways:
                found.append(Unit(slot.name, slot.sources, tuple(ways)))
    return found


def _way(slot: Slot, storage: RowBlocks, losses: Losses, recipe: Recipe) -> Choice:
    nbytes = replace(slot, storage=storage).nbytes
    loss = sum(losses[name][storage] for name in slot.sources)
    return Choice(storage, nbytes, loss, _time(slot, storage, nbytes, recipe))


def _time(slot: Slot, storage: RowBlocks, nbytes: int, recipe: Recipe) -> int:
    """Return the time that the matrix takes. Only the CPU's int8 kernels were measured; elsewhere
    an answer's token takes as long as reading the weights."""
    if recipe.accuracy_level != 4:
        return nbytes
    return chat_time(*slot.shape, storage.bits, storage.block_size)


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
        "time": choice.time,
        "predicted_kl": float(f"{choice.loss:.3g}"),
    }


def _others(unit: Unit, decision: Decision) -> list[dict[str, Any]]:
    got = decision.allocation[unit.name]
    return [_choice(choice) for choice in unit.choices if choice is not got]


@dataclass(frozen=True)
class Kind:
    """Matrices that differ only by their layer: how many have each bits and block size, their bytes
    and predicted loss, and the loss if all had 4 bits in blocks of 64."""

    name: str
    storages: Sequence[tuple[tuple[int, int], int]]
    nbytes: int
    loss: float
    plain_loss: float


def summarize(decision: Decision) -> list[Kind]:
    """Return what each kind of matrix got."""
    kinds: dict[str, list[Unit]] = {}
    for unit in decision.units:
        kinds.setdefault(re.sub(r"^model\.(layers\.\d+\.)?", "", unit.name), []).append(unit)
    found = []
    for name, units in kinds.items():
        got = [decision.allocation[unit.name] for unit in units]
        ways = Counter(_form(choice.storage) for choice in got)
        plain = [c.loss for u in units for c in u.choices if _form(c.storage) == PLAIN]
        loss = sum(choice.loss for choice in got)
        nbytes = sum(choice.nbytes for choice in got)
        found.append(Kind(name, sorted(ways.items()), nbytes, loss, sum(plain)))
    return found


def _form(storage: RowBlocks) -> tuple[int, int]:
    return storage.bits, storage.block_size
