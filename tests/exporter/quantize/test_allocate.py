"""Sharing out a budget: never over it, never worse with more, and as good as trying everything."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.quantize.allocate import (
    Allocation,
    Choice,
    Unit,
    hull,
    smallest,
    total_loss,
    within_bytes,
    within_loss,
)

choices = st.builds(
    Choice,
    st.just(RowBlocks(4, 32)),
    st.integers(1, 50),
    st.integers(0, 1000).map(float),
)
units = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda found: [Unit(f"m{i}", (f"m{i}.weight",), tuple(c)) for i, c in enumerate(found)]
)


def bytes_of(allocation: Allocation) -> int:
    return sum(choice.nbytes for choice in allocation.values())


@given(units, st.integers(0, 220))
def test_never_over_the_budget_unless_nothing_is_smaller(found: list[Unit], budget: int) -> None:
    got = within_bytes(found, budget)
    least = sum(min(choice.nbytes for choice in unit.choices) for unit in found)
    assert bytes_of(got) <= max(budget, least)
    assert set(got) == {unit.name for unit in found}


@given(units, st.integers(0, 220), st.integers(0, 220))
def test_more_bytes_never_lose_more(found: list[Unit], one: int, other: int) -> None:
    low, high = sorted([one, other])
    assert total_loss(within_bytes(found, high)) <= total_loss(within_bytes(found, low))


@given(units, st.integers(0, 220))
def test_no_combination_of_as_many_bytes_loses_less(found: list[Unit], budget: int) -> None:
    """Where the greedy stops, its bytes are spent as well as any way of choosing spends them."""
    got = within_bytes(found, budget)
    best = min(
        sum(choice.loss for choice in chosen)
        for chosen in product(*(unit.choices for unit in found))
        if sum(choice.nbytes for choice in chosen) <= bytes_of(got)
    )
    assert total_loss(got) == pytest.approx(best)


@given(units, st.integers(0, 4000))
def test_a_loss_is_met_if_any_combination_meets_it(found: list[Unit], loss: float) -> None:
    got = within_loss(found, loss)
    least = sum(min(choice.loss for choice in unit.choices) for unit in found)
    assert total_loss(got) <= max(loss, least) + 1e-9


@given(units)
def test_smallest_is_the_fewest_bytes(found: list[Unit]) -> None:
    least = sum(min(choice.nbytes for choice in unit.choices) for unit in found)
    assert bytes_of(smallest(found)) == least


def test_a_choice_above_the_line_between_two_others_is_never_taken() -> None:
    ways = (
        Choice(RowBlocks(4, 64), 10, 10.0),
        Choice(RowBlocks(4, 32), 20, 9.0),
        Choice(RowBlocks(8, 64), 30, 0.0),
    )
    assert [choice.nbytes for choice in hull(ways)] == [10, 30]
