"""Tokens that were drafted and verified together: the same answer as one token after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.bound_graph import BoundGraph
from llama_onnx.runtime.engine.drafting import Speculation
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.events import EndEvent, Event, TokenEvent
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.guidance import Guide, open_guidance
from llama_onnx.runtime.engine.sampling.sampler import Chosen, Sampler
from llama_onnx.runtime.engine.speculation.speculator import Speculator, Text
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.answers import (
    CONTEXT,
    Greedy,
    Token,
    ask,
    greedy_text,
    let_every_step_take_as_long,
    open_engine,
    random_prompts,
    tokens_of,
)
from tests.support.parity import Make

COUNT = 40
PROMPTS = [[5, 6, 7, 8] * 6, [*range(20, 40), *range(20, 30)], *random_prompts(30, 3)]


class Scripted(Speculator):
    """Drafts what a function says, right or wrong, instead of deciding by what pays."""

    def __init__(self, script: Callable[[Text], list[int]]) -> None:
        super().__init__(ngrams=False)
        self.script = script
        self.steps = 0

    def propose(self, text: Text, options: Any = None) -> list[int]:
        drafts = self.script(text)[: max(0, text.room)]
        self.steps += bool(drafts)
        return drafts

    def stepped(self, text: Text, seconds: float) -> None:
        pass

    def verified(self, text: Text, drafts: Any, got: int, seconds: float) -> None:
        assert 1 <= got <= len(drafts) + 1


def scripted(engine: Engine, script: Callable[[Text], list[int]]) -> Scripted:
    engine._loop._speculator = found = Scripted(script)
    return found


def right(answer: list[int], prompt: list[int], count: int) -> Callable[[Text], list[int]]:
    """Drafts of `count` tokens that come true."""
    whole = [*prompt, *answer]
    return lambda text: whole[len(text.tokens) :][:count]


@pytest.fixture(scope="module")
def engine(package_fp32: Path) -> Iterator[Engine]:
    with open_engine(package_fp32) as opened:
        yield opened


def read(engine: Engine, prompt: list[int], **options: Any) -> tuple[list[int], EndEvent]:
    answer = engine.submit(ask(prompt, options.pop("count", COUNT), **options))
    tokens = tokens_of(answer)
    assert answer.end is not None
    return tokens, answer.end


# The same tokens


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_drafts_that_come_true_are_pytorchs_own_answer(engine: Engine, count: int) -> None:
    for prompt in PROMPTS:
        expected = greedy_text(tiny.GQA, prompt, COUNT)
        speculator = scripted(engine, right(expected, prompt, count))
        tokens, end = read(engine, prompt, reuse=False)
        assert tokens == expected
        assert speculator.steps == -(-(COUNT - 2) // (count + 1))
        assert end.drafted_tokens == end.accepted_tokens > 0


DRAFTS = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(0, 287), max_size=6)), max_size=12
)
REPETITIVE = st.builds(
    lambda unit, times, rest: (unit * times)[:120] + rest,
    st.lists(st.integers(3, 287), min_size=1, max_size=12),
    st.integers(1, 20),
    st.lists(st.integers(3, 287), max_size=8),
)


@settings(max_examples=60)
@given(REPETITIVE, DRAFTS, st.integers(1, 24), st.booleans())
def test_no_draft_changes_an_answer(
    engine: Engine, prompt: list[int], drafts: Any, count: int, reuse: bool
) -> None:
    """Each step's draft begins with some tokens that come true, and goes on with any."""
    engine._loop._speculator = None
    expected, _ = read(engine, prompt, count=count, reuse=False)
    whole, left = [*prompt, *expected], list(drafts)

    def script(text: Text) -> list[int]:
        if not left:
            return []
        true, rest = left.pop()
        return [*whole[len(text.tokens) :][:true], *rest]

    scripted(engine, script)
    tokens, end = read(engine, prompt, count=count, reuse=reuse)
    assert tokens == expected and end.reason == "length"
    assert 0 <= end.accepted_tokens <= end.drafted_tokens


class Recording(Sampler):
    """A sampler that keeps the logits it saw."""

    def __init__(self, choice: Choice, prompt: list[int]) -> None:
        super().__init__(choice, prompt, 288)
        self.logits: list[Any] = []

    def choose(self, logits: Any) -> Chosen:
        self.logits.append(logits.copy())
        return super().choose(logits)


@settings(max_examples=25)
@given(REPETITIVE, st.integers(0, 2**64 - 1), st.integers(1, 6))
@example([285], 0, 1)
def test_a_sampled_answer_has_the_same_draws_and_log_probabilities(
    engine: Engine, prompt: list[int], seed: int, count: int
) -> None:
    """With everything that depends on the answer so far.

    Logits of a step with drafts differ in their last bits, so a token at the edge of top-k or top-p
    may be another. What must hold: equal logits while the texts are equal, and each answer is what
    a sampler without drafts chooses for its logits.
    """
    choice = Choice(
        temperature=0.8, top_k=20, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, no_repeat_ngram_size=3, logprobs=2, seed=seed,
    )  # fmt: skip

    def events(chooser: Sampler) -> list[TokenEvent]:
        answer = engine.submit(ask(prompt, 20, chooser=chooser, reuse=False))
        return [event for event in answer if isinstance(event, TokenEvent)]

    engine._loop._speculator = None
    without = Recording(choice, prompt)
    plain = events(without)
    # Half of the drafts come true, so that some are rejected in the middle of a step.
    whole = [*prompt, *(event.token for event in plain)]

    def script(text: Text) -> list[int]:
        drafts = whole[len(text.tokens) :][:count]
        return [*drafts[:-1], 3] if len(text.tokens) % 2 else drafts

    scripted(engine, script)
    with_drafts = Recording(choice, prompt)
    drafted = events(with_drafts)
    assert any(event.accepted for event in drafted)
    assert len(drafted) == len(plain) == len(with_drafts.logits)

    replay = Sampler(choice, prompt, 288)
    assert [replay.choose(logits).token for logits in with_drafts.logits] == [
        event.token for event in drafted
    ]
    for step, (one, other) in enumerate(zip(drafted, plain, strict=True)):
        np.testing.assert_allclose(with_drafts.logits[step], without.logits[step], atol=1e-4)
        if one.token != other.token:
            break  # the texts differ from here
        assert one.logprobs is not None and other.logprobs is not None
        assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)


def test_a_guided_answer_is_the_same(engine: Engine, package_fp32: Path) -> None:
    guidance = open_guidance(package_fp32, 288, (2,))
    compiled = guidance.compile(Guide("regex", "(the [a-f]{3,5} fox, ){4}"))

    def answer() -> tuple[list[int], EndEvent]:
        chooser = Sampler(Choice(temperature=1.0, seed=7), PROMPTS[0], 288, compiled.start())
        return read(engine, PROMPTS[0], count=80, chooser=chooser, end_tokens={2}, reuse=False)

    engine._loop._speculator = None
    plain, end = answer()
    assert end.reason == "stop" and len(plain) > 12
    scripted(engine, lambda text: right(plain, PROMPTS[0], 6)(text)[: 1 + len(text.tokens) % 6])
    drafted, end = answer()
    assert drafted == plain and end.accepted_tokens > 5


@pytest.mark.parametrize("name", ["fp32", "int4-exact"])
def test_greedy_answers_are_equal_with_and_without(
    made: Make, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At fp32 and at accuracy level 1, with the speculator that decides by what pays."""
    let_every_step_take_as_long(monkeypatch)
    package, _ = made(name)
    drafted = 0
    with open_engine(package) as plain, open_engine(package, speculate=True) as drafting:
        for prompt in PROMPTS:
            tokens, end = read(drafting, prompt, count=200)
            assert tokens == read(plain, prompt, count=200)[0]
            drafted += end.drafted_tokens
    assert drafted > 20, "nothing was tested"


def test_every_difference_at_accuracy_level_4_is_a_near_tie(
    made: Make,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """ONNX Runtime multiplies one row by another kernel than several."""
    let_every_step_take_as_long(monkeypatch)
    package, _ = made("int4")
    differences = drafted = 0
    prompts = [*PROMPTS, *random_prompts(*[20] * 8, seed=3)]
    with open_engine(package) as plain, open_engine(package, speculate=True) as drafting:
        for prompt in prompts:
            chooser = Greedy()
            expected, _ = read(plain, prompt, count=100, chooser=chooser, reuse=False)
            tokens, end = read(drafting, prompt, count=100, reuse=False)
            drafted += end.drafted_tokens
            place = next((i for i in range(100) if tokens[i] != expected[i]), None)
            if place is not None:
                differences += 1
                logits = chooser.seen[place]
                gap = logits.max() - logits[tokens[place]]
                assert gap < 0.3 * logits.std(), f"parts at {place}, which is no near-tie"
    assert drafted > 20
    record_property("answers that part at a near-tie", f"{differences} of {len(prompts)}")


# Where a draft ends


def test_an_end_token_inside_a_draft_ends_the_answer(engine: Engine) -> None:
    expected = greedy_text(tiny.GQA, PROMPTS[2], COUNT)
    place = next(i for i in range(4, COUNT) if expected[i] not in expected[:i])
    scripted(engine, right(expected, PROMPTS[2], 16))
    tokens, end = read(engine, PROMPTS[2], end_tokens={expected[place]})
    assert tokens == expected[: place + 1]
    assert (end.reason, end.new_tokens, end.accepted_tokens) == ("stop", place + 1, place)
    # What is kept for the next turn is the text up to there, and computes the same.
    text = [*PROMPTS[2], *tokens, *PROMPTS[3]]
    engine._loop._speculator = None
    again, end = read(engine, text)
    assert end.reused_tokens == len(PROMPTS[2]) + place
    assert again == greedy_text(tiny.GQA, text, COUNT)


def test_no_draft_goes_beyond_the_limit_or_the_context(engine: Engine) -> None:
    prompt = PROMPTS[0]
    room = CONTEXT - len(prompt)
    expected = greedy_text(tiny.GQA, prompt, room)
    lengths: list[int] = []

    def script(text: Text) -> list[int]:
        lengths.append(len(text.tokens) + text.room + 1)
        return right(expected, prompt, 16)(text)

    scripted(engine, script)
    tokens, end = read(engine, prompt, count=room, reuse=False)
    assert tokens == expected and end.reason == "length"
    assert set(lengths) == {CONTEXT}
    tokens, _ = read(engine, prompt, count=7, reuse=False)
    assert tokens == expected[:7]


class Stopping:
    """Takes the largest logit; at one choice, waits until it is let through."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        self.reached, self.opened = threading.Event(), threading.Event()

    def choose(self, logits: Any) -> Token:
        self.count += 1
        if self.count == self.at:
            self.reached.set()
            assert self.opened.wait(20)
        return Token(int(logits.argmax()))


def test_an_answer_is_cancelled_in_the_middle_of_a_verified_step(engine: Engine) -> None:
    expected = greedy_text(tiny.GQA, PROMPTS[2], COUNT)
    scripted(engine, right(expected, PROMPTS[2], 16))
    chooser = Stopping(at=5)
    answer = engine.submit(ask(PROMPTS[2], COUNT, chooser=chooser, reuse=False))
    assert chooser.reached.wait(20)
    answer.cancel()
    chooser.opened.set()
    assert tokens_of(answer) == expected[:5]
    assert answer.end is not None
    assert (answer.end.reason, answer.end.new_tokens, chooser.count) == ("cancelled", 5, 5)
    assert answer.end.accepted_tokens == 4
    assert read(engine, PROMPTS[2], reuse=False)[0] == expected


def test_what_fails_at_a_drafted_token_ends_one_answer(engine: Engine) -> None:
    class Fails:
        count = 0

        def choose(self, logits: Any) -> Token:
            self.count += 1
            if self.count == 4:
                raise UsageError("no token may follow.")
            return Token(int(logits.argmax()))

    expected = greedy_text(tiny.GQA, PROMPTS[2], COUNT)
    scripted(engine, right(expected, PROMPTS[2], 16))
    with pytest.raises(UsageError, match=r"no token may follow\."):
        read(engine, PROMPTS[2], chooser=Fails())
    assert read(engine, PROMPTS[2])[0] == expected


def test_a_verified_step_that_fails_ends_one_answer(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_onnx.targets.errors import PackageError

    run = BoundGraph.run

    def fail(self: BoundGraph, ids: Any, *rest: Any) -> Any:
        if ids.shape[1] == 5:
            raise PackageError("onnxruntime failed.")
        return run(self, ids, *rest)

    expected = greedy_text(tiny.GQA, PROMPTS[2], COUNT)
    with open_engine(package_fp32) as opened:
        scripted(opened, right(expected, PROMPTS[2], 4))
        with monkeypatch.context() as patch:
            patch.setattr(BoundGraph, "run", fail)
            with pytest.raises(PackageError, match="onnxruntime failed"):
                read(opened, PROMPTS[2])
        assert read(opened, PROMPTS[2])[0] == expected


# Who drafts


def test_the_events_say_what_was_drafted_and_accepted(engine: Engine) -> None:
    expected = greedy_text(tiny.GQA, PROMPTS[2], 12)
    wrong = (expected[5] + 1) % 288

    def script(text: Text) -> list[int]:
        done = len(text.tokens) - len(PROMPTS[2])
        return [*expected[1:5], wrong, 9] if done == 1 else []

    scripted(engine, script)
    answer = engine.submit(ask(PROMPTS[2], 12, reuse=False))
    events: list[Event] = list(answer)
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert [event.token for event in tokens] == expected
    assert [event.drafted for event in tokens] == [0, 6, *[0] * 10]
    assert [event.accepted for event in tokens] == [False, *[True] * 4, *[False] * 7]
    assert answer.end is not None
    assert (answer.end.drafted_tokens, answer.end.accepted_tokens) == (6, 4)


def test_sequences_that_share_steps_do_not_draft(engine: Engine) -> None:
    generating: list[int] = []

    def script(text: Text) -> list[int]:
        held = engine._loop._held.values()
        generating.append(sum(task.new_tokens > 0 for task in held))
        return [5]

    scripted(engine, script)
    answers = [
        engine.submit(ask(prompt, count, reuse=False))
        for prompt, count in zip(PROMPTS, (10, 20, 30, COUNT), strict=True)
    ]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = tokens_of(answer)
        assert tokens == greedy_text(tiny.GQA, prompt, len(tokens))
    # The longest answer is alone for its last ten tokens.
    assert len(generating) >= 5 and set(generating) == {1}


def test_an_answer_that_must_not_draft_does_not(engine: Engine) -> None:
    speculator = scripted(engine, lambda text: [5])
    _, end = read(engine, PROMPTS[0], speculate=False)
    assert end.drafted_tokens == speculator.steps == 0


@dataclass(frozen=True)
class Refused:
    target: str
    options: Options
    said: str


REFUSED = {
    "portable": Refused("portable", Options("fp32"), "cannot be rewound: export it for cpu"),
    "last logits": Refused("cpu", Options("fp32", logits="last"), "with --logits all"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_cannot_verify_says_so(tmp_path: Path, name: str) -> None:
    case = REFUSED[name]
    source = tiny.write_huggingface(tmp_path / "source")
    target = get_target(case.target)
    package = export_package(source, tmp_path / "package", target, case.options).package
    opened = ModelPackage.open(package)
    with pytest.raises(UsageError, match=f"cannot verify drafts: .*{case.said}"):
        Engine(opened, CONTEXT, threads=1, speculation=Speculation("ngram"))
    with Engine(opened, CONTEXT, threads=1, speculation=Speculation("auto")) as engine:
        _, end = read(engine, PROMPTS[0])
        assert end.drafted_tokens == 0
