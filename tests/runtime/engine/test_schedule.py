from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime.engine.schedule import (
    CHUNK,
    SHARED_CHUNK,
    Capacity,
    Job,
    Need,
    Read,
    Step,
    admit,
    next_action,
    part,
)

GROUPS = st.sampled_from([None, "a", "b"])


@dataclass
class Simulated:
    """A sequence as the loop would have it."""

    job: Job
    steps: int  # still to make
    waited: int = 0  # actions since it was last served


def run(
    sequences: list[tuple[str | None, int, int]], seconds_a_token: float, seconds_a_step: float
) -> list[tuple[Read | Step, float]]:
    """Carry out what `next_action` says until all is done; check that nobody waits for long."""
    left = {
        key: Simulated(Job(key, group, unread, key), steps)
        for key, (group, unread, steps) in enumerate(sequences)
    }
    done: list[tuple[Read | Step, float]] = []
    turn, owed = len(left), 0.0
    while left:
        jobs = [each.job for each in left.values()]
        action = next_action(jobs, owed)
        served = (action.key,) if isinstance(action, Read) else action.keys
        if isinstance(action, Read):
            seconds = action.count * seconds_a_token
            owed = owed + seconds if any(not job.unread for job in jobs) else 0.0
        else:
            seconds = seconds_a_step
            owed = max(0.0, owed - seconds)
        done.append((action, seconds))
        for key, each in list(left.items()):
            each.waited += 1
            if key in served:
                turn += 1
                each.waited = 0
                each.job = replace(each.job, served=turn)
                if isinstance(action, Read):
                    each.job = replace(each.job, unread=each.job.unread - action.count)
                else:
                    each.steps -= 1
                if not each.job.unread and not each.steps:
                    del left[key]
        # Between two turns of a sequence: a part of every other prompt, with as many steps as fit
        # into its time, of each group.
        steps_a_part = CHUNK * seconds_a_token / seconds_a_step + 1
        limit = (len(sequences) + 1) * (1 + steps_a_part) + 3
        assert all(each.waited <= limit for each in left.values())
    return done


@given(
    st.lists(st.tuples(GROUPS, st.integers(1, 1500), st.integers(1, 20)), min_size=1, max_size=6),
    st.sampled_from([0.001, 0.01]),
    st.sampled_from([0.01, 0.1]),
)
def test_everything_is_done_once_and_nobody_starves(
    sequences: list[tuple[str | None, int, int]], seconds_a_token: float, seconds_a_step: float
) -> None:
    done = run(sequences, seconds_a_token, seconds_a_step)
    for key, (group, unread, steps) in enumerate(sequences):
        reads = [a.count for a, _ in done if isinstance(a, Read) and a.key == key]
        made = [a for a, _ in done if isinstance(a, Step) and key in a.keys]
        assert sum(reads) == unread and max(reads) <= CHUNK
        assert len(made) == steps
        for step in made:
            assert {sequences[other][0] for other in step.keys} == {group}


def test_one_text_alone_is_read_in_the_parts_that_were_always_read() -> None:
    """As `numpy.array_split` cuts it, which genai is given too."""
    for unread in (1, 2, 511, 512, 513, 1024, 1025, 5000):
        parts, left = [], unread
        while left:
            parts.append(part(left, CHUNK))
            left -= parts[-1]
        pieces = np.array_split(np.arange(unread), max(1, -(-unread // CHUNK)))
        assert parts == [len(piece) for piece in pieces]
    assert part(5000, None) == 5000


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    long, short = Job(1, None, 4000, served=5), Job(2, None, 20, served=4)
    assert next_action([long, short], 0.0) == Read(2, 20)


def test_while_others_generate_the_parts_are_shorter() -> None:
    reading, generating = Job(1, None, 1024, 1), Job(2, None, 0, 2)
    assert next_action([reading, generating], 0.0) == Read(1, SHARED_CHUNK)
    assert next_action([reading], 0.0) == Read(1, CHUNK)


def test_steps_and_parts_get_equal_time() -> None:
    """A prompt of 4,000 tokens comes to an answer that is being generated."""
    done = run([(None, 1, 1000), (None, 4000, 1)], 0.01, 0.05)
    last = max(i for i, (action, _) in enumerate(done) if isinstance(action, Read))
    reading = sum(seconds for action, seconds in done[:last] if isinstance(action, Read))
    steps = sum(seconds for action, seconds in done[:last] if isinstance(action, Step))
    assert 0.9 <= steps / reading <= 1.1


def test_texts_with_different_adapters_make_steps_in_turn() -> None:
    jobs = [Job(1, None, 0, 3), Job(2, "a", 0, 2), Job(3, None, 0, 4)]
    assert next_action(jobs, 0.0) == Step((2,))
    assert next_action([replace(jobs[1], served=9), jobs[0], jobs[2]], 0.0) == Step((1, 3))


NEEDS = st.lists(st.builds(Need, GROUPS, st.integers(1, 50)), max_size=8)


@given(NEEDS, NEEDS, st.integers(1, 6), st.integers(1, 200), st.booleans())
def test_no_more_are_admitted_than_there_is_room_for(
    waiting: list[Need], held: list[Need], rows: int, positions: int, rectangular: bool
) -> None:
    capacity = Capacity(rows, positions, rectangular)
    if not capacity.holds(held):
        return
    admitted = admit(dict(enumerate(waiting)), held, capacity)
    assert admitted == list(range(len(admitted))), "in their order"
    taken = [*held, *(waiting[key] for key in admitted)]
    assert capacity.holds(taken)
    if len(admitted) < len(waiting):
        assert not capacity.holds([*taken, waiting[len(admitted)]]), "and as many as fit"


@given(NEEDS)
def test_what_fits_alone_is_admitted_once_the_others_are_gone(waiting: list[Need]) -> None:
    capacity = Capacity(2, 50, rectangular=True)
    left, rounds = dict(enumerate(waiting)), 0
    while left:
        for key in admit(left, [], capacity):
            del left[key]
        rounds += 1
        assert rounds <= len(waiting)


@pytest.mark.parametrize(("rectangular", "positions"), [(True, 2 * 30 + 7), (False, 47)])
def test_rows_of_a_group_are_as_long_as_the_longest(rectangular: bool, positions: int) -> None:
    needs = [Need(None, 30), Need(None, 10), Need("a", 7)]
    assert Capacity(8, 100, rectangular).positions_of(needs) == positions
