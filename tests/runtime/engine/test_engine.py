"""Many answers at once over one session: what each says, how it ends, and what is left of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine import cache_budget
from llama_onnx.runtime.engine.bound_graph import BoundGraph
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.events import EndEvent, PromptEvent, TokenEvent
from llama_onnx.runtime.engine.sampling.choice import Choice
from llama_onnx.runtime.engine.sampling.sampler import Sampler
from llama_onnx.runtime.engine.shared_rows import SharedRows
from llama_onnx.targets.errors import LlamaOnnxError, PackageError, ResourceError, UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import get_target
from tests.support import adapters, tiny
from tests.support.answers import (
    CONTEXT,
    Greedy,
    Token,
    ask,
    open_engine,
    random_prompts,
    tokens_of,
)
from tests.support.packages import greedy
from tests.support.parity import Make
from tests.support.pytorch import reference

PROMPTS = random_prompts(5, 40, 17, 90, 60, 2)
COUNT = 24


def pytorch_greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference(tiny.GQA, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def engine(package_fp32: Path) -> Iterator[Engine]:
    with open_engine(package_fp32) as opened:
        yield opened


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What the engine logs, from the level INFO on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("llama_onnx.engine")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(before)


# What an answer says


def test_answers_at_once_are_pytorchs_own(engine: Engine) -> None:
    answers = [engine.submit(ask(prompt, COUNT, reuse=False)) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert tokens_of(answer) == pytorch_greedy(prompt, COUNT)


def test_a_device_shares_steps_and_keeps_what_was_read(package_fp32: Path) -> None:
    """What is done on CUDA, with the CPU as the device: other memory, the same tokens."""
    device = replace(CPU, name="device")
    with Engine(ModelPackage.open(package_fp32), CONTEXT, device, threads=1) as opened:
        answers = [opened.submit(ask(prompt)) for prompt in PROMPTS]
        assert [tokens_of(each) for each in answers] == [pytorch_greedy(p, 12) for p in PROMPTS]
        longest = max(PROMPTS, key=len)
        again = list(opened.submit(ask(longest)))
        assert tokens_of(again) == pytorch_greedy(longest, 12)
        (prompt,) = (event for event in again if isinstance(event, PromptEvent))
        assert prompt.reused == len(longest) - 2


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int4", "int4-exact", "int4-last"])
def test_an_answer_alone_is_genais(made: Make, name: str) -> None:
    package, _ = made(name)
    with open_engine(package) as opened:
        for prompt in PROMPTS:
            answer = opened.submit(ask(prompt, COUNT, reuse=False))
            assert tokens_of(answer) == greedy(package, prompt, COUNT)


@pytest.mark.parametrize("name", ["fp32", "int4", "int4-exact", "int4-last"])
def test_answers_at_once_are_genais_but_for_near_ties(made: Make, name: str) -> None:
    """At accuracy level 4, ONNX Runtime multiplies one row by another kernel than several."""
    package, _ = made(name)
    choosers = [Greedy() for _ in PROMPTS]
    with open_engine(package) as opened:
        answers = [
            opened.submit(ask(prompt, COUNT, chooser=chooser, reuse=False))
            for prompt, chooser in zip(PROMPTS, choosers, strict=True)
        ]
        found = [tokens_of(answer) for answer in answers]
    expected = [greedy(package, prompt, COUNT) for prompt in PROMPTS]
    differences = [
        next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), -1)
        for ours, theirs in zip(found, expected, strict=True)
    ]
    if name in ("fp32", "int4-exact"):
        assert differences == [-1] * len(PROMPTS)
    for row, position in enumerate(differences):
        if position >= 0:
            logits = choosers[row].seen[position]
            gap = logits.max() - logits[expected[row][position]]
            assert gap < 0.3 * logits.std(), f"row {row} parts at {position}, which is no near-tie"


def test_a_package_for_any_runtime_and_one_with_an_int8_cache(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    for name, target, options in (
        ("portable", "portable", Options("fp32")),
        ("int8 cache", "cpu", Options("fp32", kv_cache="int8")),
    ):
        package = export_package(source, tmp_path / name, get_target(target), options).package
        with open_engine(package) as opened:
            answers = [opened.submit(ask(prompt, COUNT)) for prompt in PROMPTS]
            found = [tokens_of(answer) for answer in answers]
        assert found == [greedy(package, prompt, COUNT) for prompt in PROMPTS]


def test_the_events_of_an_answer(engine: Engine) -> None:
    answer = engine.submit(ask(PROMPTS[0], 3, reuse=False))
    first, *tokens, end = list(answer)
    assert isinstance(first, PromptEvent) and isinstance(end, EndEvent)
    assert (first.tokens, first.reused) == (5, 0)
    assert 0 < first.read_seconds <= first.seconds <= end.seconds
    assert [type(event) for event in tokens] == [TokenEvent] * 3
    assert (end.reason, end.prompt_tokens, end.new_tokens, end.reused_tokens) == ("length", 5, 3, 0)
    assert 0 <= end.waited_seconds < end.seconds
    assert answer.end is end and list(answer) == []
    with pytest.raises(FrozenInstanceError):
        end.reason = "stop"  # type: ignore[misc]


def test_an_end_token_ends_the_answer_and_counts(engine: Engine) -> None:
    expected = pytorch_greedy(PROMPTS[1], COUNT)
    place = next(i for i in range(3, COUNT) if expected[i] not in expected[:i])
    answer = engine.submit(ask(PROMPTS[1], COUNT, end_tokens={expected[place]}))
    assert tokens_of(answer) == expected[: place + 1]
    assert answer.end is not None and answer.end.reason == "stop"
    assert answer.end.new_tokens == place + 1


def test_each_answer_has_its_own_chooser(engine: Engine) -> None:
    """And its answer does not depend on what else runs."""

    class Second:
        def choose(self, logits: Any) -> Token:
            return Token(int(np.argsort(logits)[-2]))

    alone = tokens_of(engine.submit(ask(PROMPTS[2], COUNT, chooser=Second(), reuse=False)))
    mixed = [
        engine.submit(ask(PROMPTS[2], COUNT, chooser=chooser, reuse=False))
        for chooser in (Greedy(), Second(), Greedy())
    ]
    found = [tokens_of(answer) for answer in mixed]
    assert found[0] == found[2] == pytorch_greedy(PROMPTS[2], COUNT)
    assert found[1] == alone != found[0]


def test_the_async_twin_says_the_same(engine: Engine) -> None:
    async def read(prompt: list[int]) -> list[int]:
        async with engine.submit_async(ask(prompt, COUNT)) as answer:
            found = [event.token async for event in answer if isinstance(event, TokenEvent)]
        assert answer.end is not None and answer.end.reason == "length"
        return found

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*map(read, PROMPTS))

    assert asyncio.run(all_at_once()) == [pytorch_greedy(prompt, COUNT) for prompt in PROMPTS]


def test_an_async_answer_whose_loop_has_ended_is_dropped(package_fp32: Path) -> None:
    async def leave(opened: Engine) -> Any:
        answer = opened.submit_async(ask(PROMPTS[0], 250))
        await anext(answer)
        return answer

    with open_engine(package_fp32) as opened:
        abandoned = asyncio.run(leave(opened))
        assert tokens_of(opened.submit(ask(PROMPTS[1], 4))) == pytorch_greedy(PROMPTS[1], 4)
        wait_for(lambda: not opened._loop._held)
        del abandoned


# Adapters


Adapted = tuple[Path, dict[str | None, list[int]]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A package with two adapters, and what merged models say after `PROMPTS[3]`."""
    tmp_path = tmp_path_factory.mktemp("adapted")
    source = tiny.write_huggingface(tmp_path / "source")
    changes = {
        name: adapters.factors(
            {module: 4 for layer in range(3) for module in adapters.attention(layer, *"qv")},
            seed=seed,
        )
        for name, seed in (("first", 1), ("second", 2))
    }
    kept = {name: adapters.write_adapter(tmp_path / name, each) for name, each in changes.items()}
    cpu = get_target("cpu")
    package = export_package(source, tmp_path / "package", cpu, Options("fp32"), kept=kept).package
    expected: dict[str | None, list[int]] = {None: greedy(package, PROMPTS[3], COUNT)}
    for name, each in changes.items():
        merged = adapters.merged(tiny.weights(tiny.GQA), each, 8 / 4)
        folder = tiny.write_huggingface(tmp_path / f"{name}-merged", tensors=merged)
        whole = export_package(folder, tmp_path / f"{name}-package", cpu, Options("fp32")).package
        expected[name] = greedy(whole, PROMPTS[3], COUNT)
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    return package, expected


def test_adapters_at_once_are_the_merged_models_own(adapted: Adapted) -> None:
    """And what was read with one adapter is not reused with another."""
    package, expected = adapted
    with open_engine(package) as opened:
        names = ["first", None, "second", "first", None]
        for _ in range(2):
            answers = [opened.submit(ask(PROMPTS[3], COUNT, adapter=each)) for each in names]
            for used, answer in zip(names, answers, strict=True):
                assert tokens_of(answer) == expected[used]
        with pytest.raises(UsageError, match="third"):
            opened.submit(ask(PROMPTS[0], adapter="third"))


def test_what_answers_have_left_makes_room_for_another_adapter(adapted: Adapted) -> None:
    """Three rows fill the caches; two end, and their room goes to an answer with an adapter."""
    package, expected = adapted
    need = len(PROMPTS[3]) + COUNT
    with open_engine(package, cache_bytes=3 * need * 768) as opened:
        loop, gate = opened._loop, Gate()
        held = opened.submit(ask(PROMPTS[3], COUNT, chooser=Pausing(gate), reuse=False))
        others = [opened.submit(ask(PROMPTS[3], COUNT, reuse=False)) for _ in range(2)]
        assert gate.reached.wait(20)
        assert sum(rows.allocated for rows in loop._rows.values()) == 3 * need
        for other in others:
            other.cancel()
        adapter = opened.submit(ask(PROMPTS[3], COUNT, adapter="first", chooser=Watching(loop)))
        gate.opened.set()
        assert tokens_of(adapter) == expected["first"]
        assert tokens_of(held) == expected[None]
        assert max(Watching.taken) <= 3 * need


class Pausing:
    """Takes the largest logit; waits at the fourth choice, when all have their rows."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.count = gate, 0

    def choose(self, logits: Any) -> Token:
        self.count += 1
        return self.gate.choose(logits) if self.count == 4 else Token(int(logits.argmax()))


class Watching:
    """Takes the largest logit, and notes how many positions are allocated."""

    taken: ClassVar[list[int]] = []

    def __init__(self, loop: Any) -> None:
        self.loop = loop

    def choose(self, logits: Any) -> Token:
        self.taken.append(sum(rows.allocated for rows in self.loop._rows.values()))
        return Token(int(logits.argmax()))


# What was read before


def usage(engine: Engine, prompt: list[int], count: int = COUNT, **options: Any) -> EndEvent:
    answer = engine.submit(ask(prompt, count, **options))
    tokens = tokens_of(answer)
    assert tokens == pytorch_greedy(prompt, count)
    assert answer.end is not None
    return answer.end


def test_the_second_turn_of_a_chat_reads_only_what_is_new(package_fp32: Path) -> None:
    system, question, another = random_prompts(60, 10, 12, seed=4)
    with open_engine(package_fp32) as opened:
        first = usage(opened, [*system, *question])
        assert first.reused_tokens == 0
        said = pytorch_greedy([*system, *question], COUNT)
        second = usage(opened, [*system, *question, *said, *another])
        # The last token of the answer was never read.
        assert second.reused_tokens == 60 + 10 + COUNT - 1
        assert usage(opened, [*system, *another]).reused_tokens == 60
        again = usage(opened, [*system, *question])
        assert again.reused_tokens == 60 + 10 - 2, "the last two are read in any case"
        assert usage(opened, [*system, *question], reuse=False).reused_tokens == 0


def test_logits_are_the_same_whether_or_not_a_text_was_read_before(package_fp32: Path) -> None:
    fresh, reused = Greedy(), Greedy()
    with open_engine(package_fp32) as opened:
        tokens_of(opened.submit(ask(PROMPTS[3], COUNT)))
        text = [*PROMPTS[3], *pytorch_greedy(PROMPTS[3], COUNT), *PROMPTS[0]]
        answers = [
            opened.submit(ask(text, COUNT, chooser=fresh, reuse=False)),
            opened.submit(ask(text, COUNT, chooser=reused)),
        ]
        assert tokens_of(answers[0]) == tokens_of(answers[1])
    assert answers[1].end is not None and answers[1].end.reused_tokens > 90
    np.testing.assert_allclose(np.array(reused.seen), np.array(fresh.seen), rtol=0, atol=1e-4)


def test_ten_callers_read_their_common_start_once(tmp_path: Path) -> None:
    """Also if they come at the same time: each goes on where another has read to."""
    config = replace(tiny.GQA, max_position_embeddings=2048)
    source = tiny.write_huggingface(tmp_path / "source", config)
    package = export_package(source, tmp_path / "p", get_target("cpu"), Options("fp32")).package
    (system,) = random_prompts(1500)
    prompts = [[*system, *own] for own in random_prompts(*[20] * 10, seed=7)]
    with open_engine(package, 2048) as opened:
        answers = [opened.submit(ask(prompt, 4)) for prompt in prompts]
        found = [tokens_of(answer) for answer in answers]
        read = sum(a.end.prompt_tokens - a.end.reused_tokens for a in answers if a.end)
        assert len(system) + 10 * 20 <= read <= 1.1 * (len(system) + 10 * 20)
        alone = [tokens_of(opened.submit(ask(prompt, 4, reuse=False))) for prompt in prompts]
    assert found == alone


def test_what_was_read_makes_room_for_those_who_run(package_fp32: Path) -> None:
    """768 bytes a position: the caches hold 300 of them."""
    with open_engine(package_fp32, cache_bytes=300 * 768) as opened:
        assert opened.layout.position_bytes == 2 * 3 * 2 * 16 * 4
        usage(opened, PROMPTS[3])
        assert opened._loop._prefixes.positions == 90 + COUNT - 1
        assert usage(opened, PROMPTS[3]).reused_tokens == 88
        usage(opened, PROMPTS[4], 200 - 60)
        assert opened._loop._prefixes.positions <= 300
        usage(opened, PROMPTS[1], 220 - 40)
        assert opened._loop._prefixes.positions <= 300
        assert usage(opened, PROMPTS[3]).reused_tokens == 0, "the longest unused went"


# Capacity


def test_no_more_run_than_the_caches_hold_and_the_others_wait(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    run = BoundGraph.run
    positions = 3 * (90 + COUNT)
    with open_engine(package_fp32, cache_bytes=positions * 768) as opened:
        loop = opened._loop

        def watch(*arguments: Any) -> Any:
            rows = sum(rows.allocated for rows in loop._rows.values())
            taken.append((rows + loop._prefixes.positions, len(loop._held)))
            return run(*arguments)

        monkeypatch.setattr(BoundGraph, "run", watch)
        answers = [opened.submit(ask(PROMPTS[i % 6], COUNT)) for i in range(12)]
        for i, answer in enumerate(answers):
            assert tokens_of(answer) == pytorch_greedy(PROMPTS[i % 6], COUNT)
    assert max(held for _, held in taken) >= 3
    assert max(sum_ for sum_, _ in taken) <= positions


def test_at_most_so_many_rows(package_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    run = BoundGraph.run
    with open_engine(package_fp32, rows=2) as opened:

        def watch(*arguments: Any) -> Any:
            held.append(len(opened._loop._held))
            return run(*arguments)

        monkeypatch.setattr(BoundGraph, "run", watch)
        answers = [opened.submit(ask(prompt, 5)) for prompt in PROMPTS]
        for answer in answers:
            tokens_of(answer)
    assert max(held) == 2


def test_an_answer_that_the_caches_cannot_hold_is_refused(package_fp32: Path) -> None:
    with open_engine(package_fp32, cache_bytes=100 * 768) as opened:
        with pytest.raises(ResourceError, match=r"prompt of 90 tokens and an answer of up to 24: "):
            opened.submit(ask(PROMPTS[3], COUNT))
        assert tokens_of(opened.submit(ask(PROMPTS[0], 4))) == pytorch_greedy(PROMPTS[0], 4)


def test_the_budget_is_half_of_what_is_free_and_said(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    from llama_onnx.runtime.doctor.facts import Memory

    monkeypatch.setattr(cache_budget, "gather_memory", lambda: Memory(10**10, 768 * 2000))
    with open_engine(package_fp32) as opened:
        assert opened.capacity.positions == 1000
    assert "hold 1,000 tokens at 768 bytes each" in logged[0]


@pytest.mark.parametrize(
    ("prompt", "count", "said"),
    [
        ([], 4, "one or more token ids"),
        ([288], 4, "from 0 to 287"),
        ([-1], 4, "from 0 to 287"),
        ([5], 0, "at least 1, not 0"),
        ([5] * 250, 7, "prompt of 250 and 7 new tokens are more than the context of 256"),
    ],
)
def test_what_the_graph_cannot_take_is_refused(
    engine: Engine, prompt: list[int], count: int, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        engine.submit(ask(prompt, count))


# The end of an answer


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


class Gate:
    """Takes the largest logit, but waits at each choice until it is let through."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def choose(self, logits: Any) -> Token:
        self.reached.set()
        assert self.opened.wait(20)
        return Token(int(logits.argmax()))


def test_another_thread_ends_an_answer_at_its_next_step(engine: Engine) -> None:
    gate = Gate()
    answer = engine.submit(ask(PROMPTS[0], 200, chooser=gate))
    assert gate.reached.wait(20)
    thread = threading.Thread(target=answer.cancel)
    thread.start()
    thread.join()
    gate.opened.set()
    assert tokens_of(answer) == pytorch_greedy(PROMPTS[0], 1)
    assert answer.end is not None and answer.end.reason == "cancelled"
    assert answer.end.new_tokens == 1


def test_a_prompt_that_is_being_read_ends_at_its_next_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny.GQA, max_position_embeddings=2048)
    source = tiny.write_huggingface(tmp_path / "source", config)
    package = export_package(source, tmp_path / "p", get_target("cpu"), Options("fp32")).package
    run, lengths, asked = BoundGraph.run, [], threading.Event()

    def run_and_cancel(self: BoundGraph, ids: Any, *rest: Any) -> Any:
        lengths.append(ids.shape[1])
        assert asked.wait(20)
        answer.cancel()
        return run(self, ids, *rest)

    monkeypatch.setattr(BoundGraph, "run", run_and_cancel)
    with open_engine(package, 2048) as opened:
        answer = opened.submit(ask(random_prompts(2000)[0], 4))
        asked.set()
        assert tokens_of(answer) == []
        assert answer.end is not None and answer.end.reason == "cancelled"
    assert lengths == [500]


def test_an_answer_that_waits_can_be_cancelled(package_fp32: Path) -> None:
    with open_engine(package_fp32, rows=1) as opened:
        gate = Gate()
        first = opened.submit(ask(PROMPTS[0], 3, chooser=gate))
        second = opened.submit(ask(PROMPTS[1], 3))
        second.cancel()
        gate.opened.set()
        assert len(tokens_of(first)) == 3
        assert tokens_of(second) == []
        assert second.end is not None and second.end.reason == "cancelled"


def test_leaving_the_block_and_dropping_the_answer_free_its_place(package_fp32: Path) -> None:
    with open_engine(package_fp32, rows=2) as opened:
        with opened.submit(ask(PROMPTS[0], 250)) as answer:
            next(answer)
        wait_for(lambda: not opened._loop._held)
        gc.disable()
        try:
            for _ in range(20):
                next(opened.submit(ask(PROMPTS[0], 250)))
            wait_for(lambda: not opened._loop._held and not opened._loop._waiting)
        finally:
            gc.enable()


def test_a_reader_that_is_slow_holds_nobody_up(engine: Engine) -> None:
    slow = engine.submit(ask(PROMPTS[0], COUNT))
    quick = engine.submit(ask(PROMPTS[1], COUNT))
    assert tokens_of(quick) == pytorch_greedy(PROMPTS[1], COUNT)
    assert tokens_of(slow) == pytorch_greedy(PROMPTS[0], COUNT)


def test_other_threads_run_while_a_prompt_is_read(tmp_path: Path) -> None:
    """onnxruntime-genai holds Python's lock meanwhile, for seconds with a real model."""
    config = replace(
        tiny.GQA, max_position_embeddings=8192, hidden_size=256, intermediate_size=512, head_dim=64
    )
    source = tiny.write_huggingface(tmp_path / "source", config)
    package = export_package(source, tmp_path / "p", get_target("cpu"), Options("fp32")).package
    with open_engine(package, 8192) as opened:
        answer = opened.submit(ask(random_prompts(4096)[0], 1, reuse=False))
        reader = threading.Thread(target=tokens_of, args=(answer,))
        ticks, started = 0, time.monotonic()
        reader.start()
        while reader.is_alive():
            ticks += 1
            time.sleep(0.001)
        seconds = time.monotonic() - started
    # In parts of 512 tokens, a thread that is blocked while each is read gets 8 turns, or 9.
    assert ticks > 20, f"{ticks} turns in {seconds:.3f} s"


# What goes wrong


def fail_when(
    monkeypatch: pytest.MonkeyPatch, condition: Callable[[Any], bool], error: Exception
) -> None:
    run = BoundGraph.run

    def run_or_fail(self: BoundGraph, ids: Any, *rest: Any) -> Any:
        if condition(ids):
            raise error
        return run(self, ids, *rest)

    monkeypatch.setattr(BoundGraph, "run", run_or_fail)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (PackageError("onnxruntime failed: a node"), PackageError, "onnxruntime failed: a node"),
        (MemoryError(), ResourceError, "not enough memory for a prompt of 40 tokens and an answer"),
        (PackageError("onnxruntime failed: bad allocation"), ResourceError, "not enough memory"),
        (ValueError("a shape"), LlamaOnnxError, r"the answer failed: a shape\."),
    ],
)
def test_a_failing_part_ends_its_answer_and_no_other(
    package_fp32: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[LlamaOnnxError],
    said: str,
) -> None:
    fail_when(monkeypatch, lambda ids: ids.shape[1] == 40, error)
    with open_engine(package_fp32) as opened:
        answers = [opened.submit(ask(prompt, COUNT, reuse=False)) for prompt in PROMPTS]
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            if len(prompt) != 40:
                assert tokens_of(answer) == pytorch_greedy(prompt, COUNT)
                continue
            with pytest.raises(kind, match=said) as caught:
                tokens_of(answer)
            assert caught.value.__cause__ is None
            assert list(answer) == []


def test_a_failing_step_ends_the_answers_in_it_and_the_engine_goes_on(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(package_fp32, rows=3) as opened:
        with monkeypatch.context() as patch:
            fail_when(patch, lambda ids: len(ids) == 3, PackageError("onnxruntime failed."))
            answers = [opened.submit(ask(prompt, COUNT)) for prompt in PROMPTS[:3]]
            for answer in answers:
                with pytest.raises(PackageError, match="onnxruntime failed"):
                    tokens_of(answer)
        assert tokens_of(opened.submit(ask(PROMPTS[4], 4))) == pytorch_greedy(PROMPTS[4], 4)


def test_buffers_that_cannot_grow_end_all_answers_in_them(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_onnx.runtime.engine.cache_layout import CacheLayout

    zeros = CacheLayout.zeros

    def fail(self: CacheLayout, name: str, rows: int, positions: int) -> Any:
        if rows == 3:
            raise MemoryError
        return zeros(self, name, rows, positions)

    with open_engine(package_fp32) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(CacheLayout, "zeros", fail)
            gate = Gate()
            answers = [opened.submit(ask(PROMPTS[0], 200, chooser=gate))]
            assert gate.reached.wait(20)
            answers += [opened.submit(ask(prompt, 5)) for prompt in PROMPTS[1:3]]
            gate.opened.set()
            for answer in answers:
                with pytest.raises(ResourceError, match="not enough memory"):
                    tokens_of(answer)
        assert tokens_of(opened.submit(ask(PROMPTS[4], 4))) == pytorch_greedy(PROMPTS[4], 4)


def test_logits_that_are_not_numbers_end_one_answer(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = BoundGraph.run

    def damage(self: BoundGraph, ids: Any, *rest: Any) -> Any:
        logits = np.array(run(self, ids, *rest))
        if len(ids) == 2:
            logits[1, 0, 7] = np.nan
        return logits

    monkeypatch.setattr(BoundGraph, "run", damage)
    with open_engine(package_fp32) as opened:
        gate = Gate()
        first = opened.submit(ask(PROMPTS[0], 8, chooser=gate))
        assert gate.reached.wait(20)
        sampler = Sampler(Choice(), PROMPTS[1], opened.layout.vocab_size)
        second = opened.submit(ask(PROMPTS[1], 8, chooser=sampler))
        gate.opened.set()
        assert tokens_of(first) == pytorch_greedy(PROMPTS[0], 8)
        with pytest.raises(PackageError, match="output is not a number after 1 tokens"):
            tokens_of(second)


def test_a_chooser_that_fails_ends_one_answer(engine: Engine) -> None:
    class Fails:
        def choose(self, logits: Any) -> Token:
            raise UsageError("no token may follow.")

    bad = engine.submit(ask(PROMPTS[0], chooser=Fails()))
    good = engine.submit(ask(PROMPTS[1], 4))
    with pytest.raises(UsageError, match=r"no token may follow\."):
        tokens_of(bad)
    assert tokens_of(good) == pytorch_greedy(PROMPTS[1], 4)


def test_what_cannot_be_kept_for_later_costs_no_answer(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    """A device without memory for a copy says so in an error of its own."""

    def fail(*_: Any) -> Any:
        raise PackageError("onnxruntime failed while moving a cache: out of memory")

    with open_engine(package_fp32) as engine:
        monkeypatch.setattr(SharedRows, "copy", fail)
        answers = [
            engine.submit(ask(prompt, count))
            for prompt, count in ((PROMPTS[0], 2), (PROMPTS[1], 12))
        ]
        assert [len(tokens_of(answer)) for answer in answers] == [2, 12]
        assert tokens_of(engine.submit(ask(PROMPTS[1], 4))) == pytorch_greedy(PROMPTS[1], 4)
    assert any("is not kept for later prompts" in line for line in logged)


def test_a_mistake_in_the_loop_leaves_nobody_waiting(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    opened = open_engine(package_fp32)
    monkeypatch.setattr(opened._loop, "_admit", lambda: 1 / 0)
    answer = opened.submit(ask(PROMPTS[0]))
    with pytest.raises(LlamaOnnxError, match="the answer failed: division by zero"):
        tokens_of(answer)
    assert "the engine's thread failed" in logged
    with pytest.raises(LlamaOnnxError, match="the engine was closed"):
        opened.submit(ask(PROMPTS[0]))
    opened.close()


# The end of the engine


def test_closing_ends_all_answers_with_an_error(package_fp32: Path) -> None:
    opened = open_engine(package_fp32, rows=1)
    gate = Gate()
    answers = [opened.submit(ask(prompt, 200, chooser=gate)) for prompt in PROMPTS[:2]]
    assert gate.reached.wait(20)
    closing = threading.Thread(target=opened.close)
    closing.start()
    gate.opened.set()
    closing.join(20)
    assert not closing.is_alive()
    for answer in answers:
        with pytest.raises(LlamaOnnxError, match="the engine was closed before the answer ended"):
            tokens_of(answer)
    with pytest.raises(LlamaOnnxError, match="the engine was closed"):
        opened.submit(ask(PROMPTS[0]))
    opened.close()


LEAVES = """
import sys
from tests.support.answers import ask, open_engine
from pathlib import Path

opened = open_engine(Path(sys.argv[1]))
answers = [opened.submit(ask([5, 6, 7], 250)) for _ in range(3)]
print(next(answers[0]).tokens)
if sys.argv[2] == "raise":
    raise SystemExit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("return", 0), ("raise", 7)])
def test_a_process_ends_in_the_middle_of_answers(package_fp32: Path, how: str, code: int) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", LEAVES, str(package_fp32), how]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "3\n", "")


def test_an_engine_without_references_ends_and_frees_its_session(package_fp32: Path) -> None:
    opened: Engine | None = open_engine(package_fp32)
    assert opened is not None
    thread = opened._loop._thread
    answer = opened.submit(ask(PROMPTS[0], 4))
    del opened
    assert tokens_of(answer) == pytorch_greedy(PROMPTS[0], 4), "its answers keep it open"
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_the_buffers_are_gone_once_nobody_uses_them(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    bind = BoundGraph.bind

    def note(self: BoundGraph, buffers: Any) -> None:
        made.extend(weakref.ref(buffer.base) for buffer in buffers.values())
        bind(self, buffers)

    monkeypatch.setattr(BoundGraph, "bind", note)
    with open_engine(package_fp32) as opened:
        tokens_of(opened.submit(ask(PROMPTS[3], 4, reuse=False)))
        wait_for(lambda: all(ref() is None for ref in made))
    assert made


@pytest.mark.slow
def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    """Weights of 40 MB, whose packed copies take as much, and caches of 2 MB."""
    config = replace(
        tiny.GQA, hidden_size=512, intermediate_size=2048, max_position_embeddings=1 << 13
    )
    source = tiny.write_huggingface(tmp_path / "source", config)
    package = export_package(source, tmp_path / "p", get_target("cpu"), Options("fp32")).package
    process = psutil.Process()

    def live() -> None:
        with open_engine(package, 1 << 13) as opened:
            answers = [opened.submit(ask(p, 4)) for p in random_prompts(700, 500, 900)]
            for answer in answers:
                tokens_of(answer)

    live()  # what libraries load once stays
    before = process.memory_info().rss
    for _ in range(3):
        live()
    assert process.memory_info().rss - before < 20e6
