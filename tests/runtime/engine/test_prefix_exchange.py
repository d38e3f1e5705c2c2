"""What an engine has read goes out of it and into another one, while both are at work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.engine import Engine
from llama_onnx.runtime.engine.errand import Errand
from llama_onnx.runtime.engine.loop import Loop
from llama_onnx.runtime.engine.prefixes import Entry
from llama_onnx.targets.errors import LlamaOnnxError, UsageError
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.answers import Greedy, ask, open_engine, random_prompts, tokens_of

(PROMPT, OTHER) = random_prompts(60, 60)
POSITION = 3 * 2 * 2 * 16 * 4
"""Bytes of a token: three layers, keys and values, two heads of 16 floats."""


@pytest.fixture
def engine(package_fp32: Path) -> Iterator[Engine]:
    with open_engine(package_fp32) as opened:
        yield opened


def read(engine: Engine, prompt: list[int], count: int = 12) -> list[int]:
    """Let the engine read a prompt and answer it; return all its tokens."""
    return [*prompt, *tokens_of(engine.submit(ask(prompt, count)))]


def exported(engine: Engine, tokens: list[int], adapter: str | None = None) -> Entry:
    entry = engine.export_prefix(np.array(tokens), adapter)
    assert entry is not None
    return entry


def reused(engine: Engine, prompt: list[int], **options: Any) -> int:
    answer = engine.submit(ask(prompt, 4, **options))
    for _ in answer:
        pass
    assert answer.end is not None
    return answer.end.reused_tokens


def test_another_engine_goes_on_with_the_same_logits(engine: Engine, package_fp32: Path) -> None:
    tokens = read(engine, PROMPT)
    entry = exported(engine, tokens)
    assert entry.tokens.tolist() == tokens[:-1]
    with open_engine(package_fp32) as second:
        assert second.import_prefix(entry)
        seen = []
        for each in (engine, second):
            chooser = Greedy()
            assert reused(each, [*tokens, 5, 6, 7], chooser=chooser) == len(tokens) - 1
            seen.append(np.stack(chooser.seen))
    np.testing.assert_array_equal(seen[0], seen[1])


def test_graphs_that_grow_their_caches(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    target = get_target("portable")
    package = export_package(source, tmp_path / "p", target, Options("fp32")).package
    with open_engine(package) as first, open_engine(package) as second:
        tokens = read(first, PROMPT)
        assert second.import_prefix(exported(first, tokens))
        assert reused(second, [*tokens, 5, 6]) == len(tokens) - 1


def test_only_the_common_start_is_exported(engine: Engine) -> None:
    read(engine, PROMPT)
    entry = exported(engine, [*PROMPT[:40], *OTHER])
    assert entry.tokens.tolist() == PROMPT[:40]
    assert {part.shape[1] for part in entry.block.values()} == {40}
    assert engine.export_prefix(np.array(OTHER)) is None
    assert engine.export_prefix(np.array([], np.int64)) is None


def test_an_answer_that_was_just_cancelled_is_exported(engine: Engine) -> None:
    """It has not ended yet when it is asked for."""
    answer = engine.submit(ask(PROMPT, 150))
    shown = [next(answer) for _ in range(4)][1:]
    answer.cancel()
    entry = exported(engine, [*PROMPT, *(event.token for event in shown)])  # type: ignore[union-attr]
    assert len(entry.tokens) >= len(PROMPT) + len(shown) - 1


def test_what_goes_out_does_not_change_any_more(engine: Engine) -> None:
    tokens = read(engine, PROMPT)
    entry = exported(engine, tokens)
    before = {name: part.copy() for name, part in entry.block.items()}
    for prompt in ([*tokens, 9, 9], OTHER, PROMPT[:30] + OTHER):
        read(engine, prompt, 30)
    for name, part in entry.block.items():
        np.testing.assert_array_equal(part, before[name])


def test_it_works_while_answers_run(engine: Engine) -> None:
    tokens = read(engine, PROMPT)
    plain = tokens_of(engine.submit(ask(OTHER, 100, reuse=False)))
    running = engine.submit(ask(OTHER, 100, reuse=False))
    found: list[int] = []

    def exchange() -> None:
        for _ in range(20):
            entry = exported(engine, tokens)
            assert engine.import_prefix(entry)
            found.append(len(entry.tokens))

    threads = [threading.Thread(target=exchange) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert tokens_of(running) == plain
    for thread in threads:
        thread.join()
    assert found == [len(tokens) - 1] * 60


def test_it_counts_and_makes_room(package_fp32: Path, engine: Engine) -> None:
    entry = exported(engine, read(engine, PROMPT))
    other = exported(engine, read(engine, OTHER))
    size = len(entry.tokens)
    with open_engine(package_fp32, cache_bytes=POSITION * (size + 10)) as small:
        assert small.import_prefix(entry)
        assert small.load().used == pytest.approx(size / (size + 10))
        assert small.import_prefix(other)  # the first one goes
        assert small.load().used == pytest.approx(size / (size + 10))
        assert small.export_prefix(entry.tokens) is None
        assert not small.make_room(size + 11)
        assert small.export_prefix(other.tokens) is not None
        assert small.make_room(11)
        assert small.load().used == 0
    with open_engine(package_fp32, cache_bytes=POSITION * (size - 1)) as smaller:
        assert not smaller.import_prefix(entry)
        assert smaller.load().used == 0


def test_running_answers_keep_their_room(package_fp32: Path, engine: Engine) -> None:
    entry = exported(engine, read(engine, PROMPT))
    with open_engine(package_fp32, cache_bytes=POSITION * 250) as small:
        running = small.submit(ask(OTHER, 180))
        next(running)
        assert not small.import_prefix(entry)
        running.cancel()
        assert small.import_prefix(entry)


def test_adapters_have_their_own(engine: Engine) -> None:
    tokens = read(engine, PROMPT)
    assert engine.export_prefix(np.array(tokens), "fox") is None
    entry = exported(engine, tokens)
    with pytest.raises(UsageError, match="no adapter 'fox'"):
        engine.import_prefix(Entry("fox", entry.tokens, entry.block))


def test_what_does_not_fit_the_graph_is_refused(engine: Engine) -> None:
    entry = exported(engine, read(engine, PROMPT))
    tokens, block = entry.tokens, dict(entry.block)
    (name, part), *_ = block.items()
    for wrong in (
        {**block, name: part[:, :-1]},
        {**block, name: part.astype(np.float16)},
        {**block, name: part[:1]},
        {**block, "other": part},
        {other: each for other, each in block.items() if other != name},
        {},
    ):
        with pytest.raises(UsageError, match="not those of this graph"):
            engine.import_prefix(Entry(None, tokens, wrong))
    for ids in (tokens * 0 - 1, tokens * 0 + 288):
        with pytest.raises(UsageError, match="not those of this graph"):
            engine.import_prefix(Entry(None, ids, block))
    malformed: list[Any] = [tokens.astype(np.int32), tokens[:0], tokens[None], np.zeros(300, int)]
    for ids in malformed:
        with pytest.raises(UsageError, match="1 to 256 token ids"):
            engine.import_prefix(Entry(None, ids, block))


def test_a_device_that_copies_nothing_takes_nothing(engine: Engine) -> None:
    entry = exported(engine, read(engine, PROMPT))
    engine.copies = False
    assert not engine.import_prefix(entry) and not engine.make_room(1)


def test_a_closed_engine_says_so(package_fp32: Path) -> None:
    engine = open_engine(package_fp32)
    entry = exported(engine, read(engine, PROMPT))
    engine.close()
    for ask_it in (lambda: engine.export_prefix(entry.tokens), lambda: engine.import_prefix(entry)):
        with pytest.raises(LlamaOnnxError, match="engine was closed"):
            ask_it()


def test_nobody_waits_for_an_engine_that_fails(
    package_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistake comes before the errand is run."""

    def fail(self: Loop) -> None:
        raise ZeroDivisionError("a mistake")

    with open_engine(package_fp32) as engine:
        monkeypatch.setattr(Loop, "_advance", fail)
        with pytest.raises(LlamaOnnxError, match="engine was closed"):
            engine.export_prefix(np.array(PROMPT))


def test_an_errand_returns_or_raises_where_it_was_asked_for() -> None:
    errands = [Errand(lambda: 5), Errand(lambda: int("x"))]
    for errand in errands:
        threading.Thread(target=errand.run).start()
    assert errands[0].wait() == 5
    with pytest.raises(ValueError, match="x"):
        errands[1].wait()
