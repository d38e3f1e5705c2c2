"""Sharing out a budget: never over it, never worse with more, and as good as trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.quantize.allocate import (
    TIME,
    Allocation,
    Choice,
    Unit,
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
    st.integers(0, 50),
)
units = st.lists(st.lists(choices, min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda found: [Unit(f"m{i}", (f"m{i}.weight",), tuple(c)) for i, c in enumerate(found)]
)


def combinations(found: list[Unit]) -> list[tuple[int, float]]:
    """Return the bytes and the loss of every way to take one choice for each unit."""
    chosen = list(product(*(unit.choices for unit in found)))
    return [(sum(c.nbytes for c in some), sum(c.loss for c in some)) for some in chosen]


def least(found: list[Unit]) -> int:
    """Return the fewest bytes that `found` can be stored in."""
    return min(nbytes for nbytes, _ in combinations(found))


def bytes_of(allocation: Allocation) -> int:
    return sum(choice.nbytes for choice in allocation.values())


@given(units, st.integers(0, 220))
def test_never_over_the_budget_unless_nothing_is_smaller(found: list[Unit], budget: int) -> None:
    got = within_bytes(found, budget)
    assert bytes_of(got) <= max(budget, least(found))
    assert set(got) == {unit.name for unit in found}


@given(units, st.integers(0, 220), st.integers(0, 220))
def test_more_bytes_never_lose_more(found: list[Unit], one: int, other: int) -> None:
    low, high = sorted([one, other])
    assert total_loss(within_bytes(found, high)) <= total_loss(within_bytes(found, low))


@given(units, st.integers(0, 220))
def test_no_combination_within_the_budget_loses_less(found: list[Unit], budget: int) -> None:
    got = within_bytes(found, budget)
    best = min(loss for nbytes, loss in combinations(found) if nbytes <= max(budget, least(found)))
    assert total_loss(got) == pytest.approx(best)


@given(units, st.integers(0, 4000))
def test_no_combination_within_the_loss_is_smaller(found: list[Unit], most: int) -> None:
    got = within_loss(found, most)
    lowest = min(loss for _, loss in combinations(found))
    small = min(nbytes for nbytes, loss in combinations(found) if loss <= max(most, lowest))
    assert total_loss(got) <= max(most, lowest)
    assert bytes_of(got) == small


@given(units, st.integers(0, 4000))
def test_no_combination_within_the_loss_is_faster(found: list[Unit], most: int) -> None:
    chosen = list(product(*(unit.choices for unit in found)))
    every = [(sum(c.time for c in some), sum(c.loss for c in some)) for some in chosen]
    limit = max(most, min(loss for _, loss in every))
    got = within_loss(found, most, TIME)
    assert total_loss(got) <= limit
    time = sum(choice.time for choice in got.values())
    assert time == min(time for time, loss in every if loss <= limit)


@given(units)
def test_smallest_is_the_fewest_bytes(found: list[Unit]) -> None:
    assert bytes_of(smallest(found)) == least(found)


def test_a_large_matrix_that_does_not_fit_leaves_its_bytes_to_others() -> None:
    large = Choice(RowBlocks(4, 32), 100, 50.0), Choice(RowBlocks(8, 32), 200, 0.0)
    small = Choice(RowBlocks(4, 32), 10, 5.0), Choice(RowBlocks(8, 32), 90, 4.0)
    found = within_bytes([Unit("a", ("a.weight",), large), Unit("b", ("b.weight",), small)], 195)
    assert [found[name].nbytes for name in "ab"] == [100, 90]


def test_sizes_too_many_to_tell_apart_waste_little() -> None:
    """A model of 7B parameters: 225 matrices whose sizes have no common divisor."""
    rng = np.random.default_rng(0)
    ways = [
        [
            Choice(RowBlocks(4, 32), 10**7 * bits + int(rng.integers(10**6)), 4.0**-bits * scale)
            for bits in (2, 4, 8)
        ]
        for scale in rng.lognormal(size=225)
    ]
    found = [Unit(f"m{i}", (f"m{i}.weight",), tuple(way)) for i, way in enumerate(ways)]
    budget = 225 * 10**7 * 5
    got = bytes_of(within_bytes(found, budget))
    assert 0.998 * budget <= got <= budget
