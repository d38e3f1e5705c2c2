"""When drafts pay: what is learned of a text and of the machine, and what drafts may cost.

Steps take the time that a test says, so that nothing depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.runtime.engine.speculation.draft_model import DraftModel
from llama_onnx.runtime.engine.speculation.ngrams import Ngrams, continuation, find
from llama_onnx.runtime.engine.speculation.rates import HitRate
from llama_onnx.runtime.engine.speculation.speculator import Speculator, Text, log
from llama_onnx.runtime.engine.speculation.step_costs import MOST_DRAFTED, Account, StepCosts, plan

Cost = Callable[[int], float]


def flat(positions: int) -> float:
    """A machine on which a step takes as long whatever it verifies."""
    return 1.0 + 0.01 * positions


def measured(positions: int) -> float:
    """About what 135M in int4 takes on Zen 5, where products are made of tiles of four rows."""
    return 1.0 if positions == 1 else 0.9 + 0.25 * 4 * -(-positions // 4) / 1.25


def steep(positions: int) -> float:
    """A machine on which a position costs a step: nothing pays."""
    return float(positions)


def noisy(cost: Cost, seed: int) -> Cost:
    rng = np.random.default_rng(seed)
    times = rng.choice([0.9, 1.0, 1.1, 3.0], 10_000, p=[0.3, 0.4, 0.25, 0.05])
    drawn = iter(times.tolist())
    return lambda positions: cost(positions) * float(next(drawn))


def generate(
    speculator: Speculator, text: Sequence[int], prompt: int, cost: Cost, key: int = 1
) -> float:
    """Return the time that `text` takes from its `prompt` on: what it says is what is chosen."""
    tokens = np.array(text, np.int64)
    done, clock = prompt, 0.0
    while done < len(tokens):
        room = len(tokens) - done - 1
        state = Text(key, None, tokens[:done], room, len(tokens))
        drafts = speculator.propose(state)
        assert len(drafts) <= min(MOST_DRAFTED, max(room, 0))
        if not drafts:
            seconds = cost(1)
            speculator.stepped(state, seconds)
            done += 1
        else:
            seconds = cost(1 + len(drafts))
            true = next((i for i, d in enumerate(drafts) if d != tokens[done + i]), len(drafts))
            speculator.verified(state, drafts, true + 1, seconds)
            done += true + 1
        clock += seconds
    speculator.forget(key)
    return clock


def random_text(length: int, seed: int, vocabulary: int = 200) -> list[int]:
    """Tokens as frequent as words are: few of them make up most of the text."""
    weights = 1 / np.arange(1, vocabulary + 1)
    rng = np.random.default_rng(seed)
    drawn: list[int] = rng.choice(vocabulary, length, p=weights / weights.sum()).tolist()
    return drawn


COSTS = {"flat": flat, "measured": measured, "steep": steep}


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("seed", range(4))
def test_text_that_does_not_repeat_costs_at_most_3_percent(cost: str, seed: int) -> None:
    """By construction: 2 % of the time and two steps, over the life of the speculator."""
    speculator = Speculator(ngrams=True)
    for key in range(3):
        text = random_text(600, seed * 10 + key)
        taken = generate(speculator, text, 100, COSTS[cost], key)
        assert taken < 500 * COSTS[cost](1) * 1.03


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from(sorted(COSTS)), st.integers(2, 400))
def test_a_hostile_text_costs_no_more(seed: int, cost: str, vocabulary: int) -> None:
    """Text that repeats just enough to be drafted, and then goes on otherwise."""
    rng = np.random.default_rng(seed)
    text: list[int] = []
    for number in range(60):
        text += [*range(1, 1 + int(rng.integers(1, 7))), int(10 + rng.integers(vocabulary))]
        if number % 3 == 0:
            text += [7, 8, 9]
    taken = generate(Speculator(ngrams=True), text, 1, COSTS[cost])
    steps = len(text) - 1
    # The most a draft may cost at once is what the account holds.
    assert taken <= COSTS[cost](1) * (steps * 1.02 + 2 + 1e-6)


@pytest.mark.parametrize(("cost", "gain"), [("flat", 4.0), ("measured", 2.0), ("steep", 0.97)])
def test_text_that_repeats_is_drafted(cost: str, gain: float) -> None:
    """A document of 200 tokens and its copy."""
    document = random_text(200, seed=5, vocabulary=5000)
    taken = generate(Speculator(ngrams=True), [*document, *document], 201, COSTS[cost])
    assert 199 * COSTS[cost](1) / taken > gain


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_is_busy_now_and_then_is_no_reason_to_stop(seed: int) -> None:
    document = random_text(200, seed=5, vocabulary=5000)
    text = document * 4
    plain = sum(noisy(measured, seed)(1) for _ in range(599))
    cost = noisy(measured, seed + 100)
    assert plain / generate(Speculator(ngrams=True), text, 201, cost) > 1.7


def test_repetition_is_found_again_after_text_without_any() -> None:
    speculator = Speculator(ngrams=True)
    generate(speculator, random_text(2000, seed=1), 10, measured)
    document = random_text(150, seed=2, vocabulary=5000)
    taken = generate(speculator, [*document, *document], 151, measured, key=2)
    assert 149 * measured(1) / taken > 1.7


def test_until_plain_steps_are_measured_nothing_is_drafted() -> None:
    speculator = Speculator(ngrams=True)
    state = Text(1, None, np.array([1, 2, 3, 4] * 5), 10, 40)
    for _ in range(3):
        assert speculator.propose(state) == []
        speculator.stepped(state, 1.0)
    assert speculator.propose(state) != []


# What follows in a text


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_the_longest_end_that_occurred_before_is_found(text: list[int]) -> None:
    def brute_force() -> tuple[int, int]:
        for length in range(len(text) - 1, 0, -1):
            for start in range(len(text) - length - 1, -1, -1):
                if text[start : start + length] == text[-length:]:
                    return length, start + length
        return 0, 0

    length, place = find(np.array(text, np.int64))
    expected = brute_force()
    if expected[0] <= 32:
        assert (length, place) == expected
    else:  # longer ends are as good as certain
        assert length == 32


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.integers(1, 20))
def test_following_token_by_token_finds_the_same(text: list[int], step: int) -> None:
    ngrams = Ngrams()
    tokens = np.array(text, np.int64)
    for end in [*range(1, len(text), step), len(text)]:
        ngrams.follow(tokens[:end])
    assert (min(ngrams._length, 32), bool(ngrams._length)) == (
        find(tokens)[0], bool(find(tokens)[0])
    )  # fmt: skip
    if ngrams._length:
        assert ngrams.draft(tokens, 3)[0] == tokens[ngrams._place]


def test_a_draft_goes_on_where_the_text_ends() -> None:
    tokens = np.array([9, 1, 2, 3, 1, 2, 3], np.int64)
    assert continuation(tokens, 4, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_the_chance_of_the_next_token_is_learned() -> None:
    ngrams = Ngrams()
    text = [1, 2, 3, 4, 5] * 30
    for end in range(1, len(text)):
        ngrams.follow(np.array(text[:end], np.int64))
    assert min(ngrams.chances(5)) > 0.9
    never = Ngrams()
    text = [token for i in range(100) for token in (1, 2, 3, 100 + i)]
    for end in range(1, len(text)):
        never.follow(np.array(text[:end], np.int64))
    assert never.chances(1)[0] < 0.2


def test_late_guesses_count_most_and_a_rate_goes_back_to_its_prior() -> None:
    rate = HitRate(0.5)
    for hit in [True] * 100 + [False] * 20:
        rate.note(hit)
    assert rate.value < 0.4
    for _ in range(400):
        rate.relax(0.01)
    assert rate.value == pytest.approx(0.5, abs=0.05)


# What steps cost


def test_costs_are_medians_and_lines_between_them() -> None:
    costs = StepCosts()
    for seconds in (1.0, 9.0, 1.1):
        costs.note(1, seconds)
        costs.note(5, 2 * seconds)
        costs.note(9, 3.3 * seconds)
    assert costs.plain == 1.1
    table = costs.table()
    assert table[1] == 1 and table[5] == pytest.approx(2) and table[9] == pytest.approx(3.3)
    assert table[3] == pytest.approx(1.5)
    assert table[17] == pytest.approx(3.3 + 8 * (3.3 - 1) / 8)


def test_one_slow_step_does_not_rule_a_length_out() -> None:
    costs = StepCosts()
    for _ in range(3):
        costs.note(1, 1.0)
    guess = costs.table()[5]
    costs.note(5, 50.0)
    assert costs.table()[5] == guess
    for _ in range(2):
        costs.note(5, 50.0)
    assert costs.table()[5] == 50


def test_a_moment_in_which_the_machine_is_busy_is_not_charged() -> None:
    costs = StepCosts()
    for _ in range(3):
        costs.note(1, 1.0)
    costs.note(3, 60.0)
    assert costs.charge(3, 60.0) == 3
    for seconds in (1.5, 1.6, 60.0, 1.4):
        costs.note(3, seconds)
    assert costs.charge(3, 60.0) == 1.6


def test_a_stall_does_not_end_the_drafts() -> None:
    document = random_text(200, seed=5, vocabulary=5000)
    stalls: list[float] = []
    steps = iter(range(10_000))

    def cost(positions: int) -> float:
        if next(steps) % 20 != 10:
            return measured(positions)
        stalls.append(30.0)
        return 30.0

    taken = generate(Speculator(ngrams=True), [*document, *document], 201, cost)
    assert stalls and 199 * measured(1) / (taken - sum(stalls)) > 1.5


def test_old_measurements_are_forgotten() -> None:
    costs = StepCosts()
    for _ in range(3):
        costs.note(5, 50.0)
    for _ in range(600):
        costs.note(1, 1.0)
    assert costs.table()[5] < 5


def test_a_plan_promises_more_than_a_plain_step_and_can_be_paid() -> None:
    table = [0.0, 1.0, *(1.0 + 0.2 * extra for extra in range(1, 17))]
    assert plan([0.99] * 16, table, 4.0).count == 16
    assert plan([0.99] * 16, table, 1.0).count == 5
    assert plan([0.99] * 16, table, 0.1).count == 0
    assert plan([0.2] * 16, table, 4.0).count == 0
    assert plan([0.9] * 16, table, 4.0, drafting=1.0).count == 0


def test_the_account_is_bounded() -> None:
    account = Account()
    account.settle(100, 1.0)
    assert account.balance == 4
    account.settle(1, 9.0)
    assert account.balance == -4
    for _ in range(10_000):
        account.earn()
    assert account.balance == 4


# A draft model


class Rows:
    """Caches of a draft that expects each token to be one more than the last."""

    def __init__(self) -> None:
        self.texts: dict[int, list[int]] = {}

    def open(self, key: int, most: int) -> None:
        self.texts[key] = []

    def close(self, key: int) -> None:
        del self.texts[key]

    def filled(self, key: int) -> int:
        return len(self.texts[key])

    def read(self, key: int, ids: Any, options: Any = None) -> Any:
        self.texts[key] += ids.tolist()
        return self.logits(key)

    def step(self, tokens: Any, options: Any = None) -> Any:
        ((key, token),) = tokens.items()
        self.texts[key].append(token)
        return {key: self.logits(key)}

    def rewind(self, key: int, filled: int) -> None:
        del self.texts[key][filled:]

    def logits(self, key: int) -> Any:
        return np.eye(300, dtype=np.float32)[self.texts[key][-1] + 1]


def rows_and_draft(context: int = 1000) -> tuple[list[Rows], DraftModel]:
    opened: list[Rows] = []

    def open_rows() -> Rows:
        opened.append(Rows())
        return opened[-1]

    return opened, DraftModel(open_rows, 300, context, 16)


def counting(length: int) -> Iterator[int]:
    """Counts to 250 again and again; each time the draft is wrong once."""
    for number in range(length):
        yield number % 250


def test_a_draft_model_follows_the_text_and_its_tokens_are_accepted() -> None:
    opened, draft = rows_and_draft()
    speculator = Speculator(ngrams=False, draft=draft)
    tokens = np.array(list(counting(700)), np.int64)
    done, accepted = 40, 0
    while done < 690:
        state = Text(1, None, tokens[:done], len(tokens) - done - 1, len(tokens))
        drafts = speculator.propose(state)
        if not drafts:
            speculator.stepped(state, 1.0)
            done += 1
            continue
        true = next((i for i, d in enumerate(drafts) if d != tokens[done + i]), len(drafts))
        speculator.verified(state, drafts, true + 1, 1.5)
        accepted += true
        done += true + 1
        (rows,) = opened
        assert rows.texts[1] == tokens[: len(rows.texts[1])].tolist()
        assert done - 2 <= len(rows.texts[1]) < done
    assert accepted > 400
    speculator.forget(1)
    assert draft._rows is None


def test_a_draft_model_reads_a_long_prompt_in_parts_and_stops_at_its_context() -> None:
    opened, draft = rows_and_draft(context=60)
    speculator = Speculator(ngrams=False, draft=draft)
    tokens = np.arange(100, dtype=np.int64)
    found = []
    for done in range(40, 70):
        state = Text(1, None, tokens[:done], 30, 100)
        found.append(len(speculator.propose(state)))
        if not found[-1]:
            speculator.stepped(state, 1.0)
        else:
            speculator.verified(state, [0] * found[-1], 1, 1.0)
    assert found[:5] == [0] * 5, "first plain steps, then parts of 16 tokens"
    assert max(found[5:8]) > 0
    assert found[20:] == [0] * 10
    assert len(opened) == 1


def test_a_draft_model_that_is_always_wrong_is_left() -> None:
    _, draft = rows_and_draft(context=5000)
    speculator = Speculator(ngrams=False, draft=draft)
    text = [token for number in range(1000) for token in (5, 200 - number % 100)]
    drafted = 0
    tokens = np.array(text, np.int64)
    for done in range(20, 1500):
        state = Text(1, None, tokens[:done], 100, 3000)
        drafts = speculator.propose(state)
        if drafts:
            drafted += 1
            speculator.verified(state, drafts, 1, 1.5)
        else:
            speculator.stepped(state, 1.0)
    assert 0 < drafted < 0.03 * 1480


def test_a_draft_model_that_fails_is_left_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warning", lambda text, *values: said.append(text % values))

    class Fails(Rows):
        def read(self, key: int, ids: Any, options: Any = None) -> Any:
            raise MemoryError("no memory")

    speculator = Speculator(ngrams=False, draft=DraftModel(Fails, 300, 1000, 16))
    state = Text(1, None, np.arange(50), 20, 100)
    for _ in range(3):
        speculator.stepped(state, 1.0)
    assert speculator.propose(state) == []
    assert said == ["drafts end: the draft package failed: no memory"]
    assert speculator.propose(state) == []
    speculator.forget(1)
