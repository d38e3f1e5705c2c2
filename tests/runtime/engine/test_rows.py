"""Sequences of different lengths in one batch, against PyTorch and against each alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.bound_graph import BoundGraph
from llama_onnx.runtime.engine.cache_layout import CacheLayout
from llama_onnx.runtime.engine.device_memory import DeviceBuffers, Joiner
from llama_onnx.runtime.engine.head_rows import choose_rows
from llama_onnx.runtime.engine.shared_rows import Rows, SharedRows
from llama_onnx.runtime.engine.single_rows import DeviceRows, GrowingRows
from llama_onnx.runtime.placement.session import open_session
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.answers import random_prompts
from tests.support.pytorch import reference

LIMIT = 1e-4
LENGTHS = (5, 40, 17, 90, 2)

KINDS: dict[str, tuple[str, Options]] = {
    "fp32": ("cpu", Options("fp32")),
    "last position only": ("cpu", Options("fp32", logits="last")),
    "one by one": ("cpu", Options("fp32")),
    "device": ("cpu", Options("fp32")),
    "device, fp16": ("cuda", Options("fp16")),
    "portable": ("portable", Options("fp32")),
    "int8 cache": ("cpu", Options("fp32", kv_cache="int8")),
    "fp16 cache": ("cuda", Options("fp16")),
}


@pytest.fixture(scope="module")
def open_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Rows]:
    """Opens new rows for one of `KINDS`, whose package and session are made once."""
    folder = tmp_path_factory.mktemp("rows")
    source = tiny.write_huggingface(folder / "source")
    opened: dict[str, Any] = {}

    def make(kind: str) -> Rows:
        if kind not in opened:
            target, options = KINDS[kind]
            package = export_package(source, folder / kind, get_target(target), options).package
            opened[kind] = open_session(package / "model.onnx", CPU, threads=1, edit=choose_rows)
        session, layout = opened[kind].session, CacheLayout.of(opened[kind].session)
        if kind == "one by one":
            return DeviceRows(session, layout, {}, "cpu")
        if kind.startswith("device"):
            return SharedRows(session, layout, {}, DeviceBuffers(Joiner(layout, CPU)), "cpu")
        if not opened[kind].shares_buffer:
            return GrowingRows(session, layout, {})
        return SharedRows(session, layout, {})

    return make


def texts(rows: Rows, prompts: list[list[int]], count: int, together: bool) -> list[Any]:
    """Return for each prompt its tokens, greedily continued, and the logits that decided them."""
    found: list[Any] = [([*prompt], []) for prompt in prompts]

    def note(key: int, logits: Any) -> None:
        found[key][0].append(int(logits.argmax()))
        found[key][1].append(logits.copy())

    for keys in [range(len(prompts))] if together else [[key] for key in range(len(prompts))]:
        for key in keys:
            rows.open(key, len(prompts[key]) + count)
            cut = len(prompts[key]) // 2  # in two parts, as the loop reads a long prompt
            for part in filter(len, (prompts[key][:cut], prompts[key][cut:])):
                logits = rows.read(key, np.array(part))
            note(key, logits)
        for _ in range(count - 1):
            for key, logits in rows.step({key: found[key][0][-1] for key in keys}).items():
                note(key, logits)
        for key in keys:
            rows.close(key)
    return found


@pytest.mark.parametrize("kind", ["fp32", "last position only", "one by one", "device", "portable"])
def test_a_batch_of_different_lengths_is_pytorchs_own(
    open_rows: Callable[[str], Rows], kind: str
) -> None:
    prompts = random_prompts(*LENGTHS)
    for tokens, logits in texts(open_rows(kind), prompts, 12, together=True):
        start = len(tokens) - 12
        expected = reference(tiny.GQA, np.array([tokens[:-1]]))[0, start - 1 :]
        np.testing.assert_allclose(np.array(logits), expected, rtol=0, atol=LIMIT)
        assert tokens[start:] == expected.argmax(1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_different_lengths_is_each_alone(
    open_rows: Callable[[str], Rows], kind: str
) -> None:
    prompts = random_prompts(*LENGTHS)
    alone = texts(open_rows(kind), prompts, 12, together=False)
    together = texts(open_rows(kind), prompts, 12, together=True)
    for (tokens, logits), (theirs, others) in zip(alone, together, strict=True):
        assert tokens == theirs
        # A step of half precision rounds what differs in its last bit.
        limit = 2e-2 if "fp16" in kind else LIMIT
        np.testing.assert_allclose(np.array(logits), np.array(others), rtol=0, atol=limit)


@pytest.mark.parametrize("kind", ["int8 cache", "fp16 cache", "device, fp16"])
def test_the_cache_has_the_type_of_the_graph(open_rows: Callable[[str], Rows], kind: str) -> None:
    rows: Any = open_rows(kind)
    rows.open(1, 8)
    rows.read(1, np.arange(3, 8))
    block = rows.copy(1, 0, 5)
    expected = np.int8 if kind == "int8 cache" else np.float16
    assert {part.dtype.type for part in block.values()} == {expected}
    assert any(part.any() for part in block.values())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "read", "step", "verify", "close", "compact"]),
        st.integers(0, 2**16),
    ),
    max_size=25,
)


@pytest.mark.parametrize("kind", ["fp32", "device"])
@settings(max_examples=40)
@given(actions=ACTIONS)
def test_rows_may_be_opened_closed_and_moved_in_any_order(
    open_rows: Callable[[str], Rows], kind: str, actions: list[tuple[str, int]]
) -> None:
    """Every step's logits are those of the sequence alone, and no buffer is larger than allowed."""
    rows: Any = open_rows(kind)
    tokens: dict[int, list[int]] = {}
    most: dict[int, int] = {}
    peak = 0
    for number, (action, seed) in enumerate(actions):
        rng = np.random.default_rng(seed)
        key = int(rng.choice(list(tokens))) if tokens else -1
        if action == "open" and len(tokens) < 4:
            most[number], tokens[number] = int(rng.integers(10, 200)), []
            rows.open(number, most[number])
        elif action == "close" and tokens:
            rows.close(key)
            del tokens[key], most[key]
        elif action == "compact":
            rows.compact()
            assert rows.allocated <= len(most) * max(most.values(), default=0)
        elif action == "read" and tokens and (room := most[key] - len(tokens[key])):
            ids = rng.integers(3, 288, rng.integers(1, room + 1))
            tokens[key] += ids.tolist()
            check(rows.read(key, ids), tokens[key], open_rows("fp32"))
        elif action == "verify" and tokens and (room := most[key] - len(tokens[key])):
            ids = rng.integers(3, 288, rng.integers(1, min(room, 20) + 1))
            kept = int(rng.integers(0, len(ids) + 1))
            logits = rows.verify(key, ids)
            assert logits.shape == (len(ids), 288)
            for place in {0, len(ids) - 1}:
                check(logits[place], [*tokens[key], *ids[: place + 1].tolist()], open_rows("fp32"))
            rows.rewind(key, len(tokens[key]) + kept)
            tokens[key] += ids[:kept].tolist()
        elif action == "step":
            ready = [k for k in tokens if tokens[k] and len(tokens[k]) < most[k]]
            chosen = [k for k in ready if rng.random() < 0.7]
            if chosen:
                new = {k: int(rng.integers(3, 288)) for k in chosen}
                for k, token in new.items():
                    tokens[k].append(token)
                for k, logits in rows.step(new).items():
                    check(logits, tokens[k], open_rows("fp32"))
        assert {k: rows.filled(k) for k in tokens} == {k: len(v) for k, v in tokens.items()}
        peak = max(peak, len(most) * max(most.values(), default=0))
        assert rows.allocated <= peak


def check(logits: Any, tokens: list[int], fresh: Rows) -> None:
    fresh.open(0, len(tokens))
    np.testing.assert_allclose(logits, fresh.read(0, np.array(tokens)), rtol=0, atol=LIMIT)


@pytest.mark.parametrize("kind", ["fp32", "int8 cache", "fp16 cache"])
def test_logits_of_several_positions_are_those_of_one_step_each(
    open_rows: Callable[[str], Rows], kind: str
) -> None:
    rows: Any = open_rows(kind)
    (text,) = random_prompts(40)
    expected = []
    rows.open(1, 100)
    rows.read(1, np.array(text[:20]))
    for token in text[20:]:
        expected.append(rows.step({1: token})[1].copy())
    rows.rewind(1, 20)
    found = rows.verify(1, np.array(text[20:]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-2 if kind[0] == "f" else LIMIT)
    if kind == "fp32":
        pytorch = reference(tiny.GQA, np.array([text]))[0, 20:]
        np.testing.assert_allclose(found, pytorch, rtol=0, atol=LIMIT)


def test_what_was_forgotten_is_never_read(open_rows: Callable[[str], Rows]) -> None:
    """Neither by the sequence itself nor by others in the same step: it is not a number here."""
    texts_ = random_prompts(60, 30)
    rows: Any = open_rows("fp32")
    for key, text in enumerate(texts_):
        rows.open(key, 100)
        rows.read(key, np.array(text))
    rows.rewind(0, 20)
    for buffer in rows._buffers.views(0, 2).values():
        buffer[0, :, 20:] = np.nan
        buffer[1, :, 30:] = np.nan
    check(rows.step({0: 7})[0], [*texts_[0][:20], 7], open_rows("fp32"))
    check(rows.verify(0, np.array([8, 9]))[-1], [*texts_[0][:20], 7, 8, 9], open_rows("fp32"))
    logits = rows.step({0: 10, 1: 11})
    check(logits[0], [*texts_[0][:20], 7, 8, 9, 10], open_rows("fp32"))
    check(logits[1], [*texts_[1], 11], open_rows("fp32"))


def test_buffers_grow_with_the_text_and_never_beyond_what_it_may_need(
    open_rows: Callable[[str], Rows],
) -> None:
    rows = open_rows("fp32")
    rows.open(1, 1 << 20)
    assert rows.allocated == 0
    rows.read(1, np.arange(3, 13))
    assert rows.allocated == 256
    rows.open(2, 200)
    assert rows.allocated == 512
    rows.close(1)
    rows.compact()
    assert rows.allocated == 200


def test_released_buffers_are_freed(open_rows: Callable[[str], Rows]) -> None:
    rows: Any = open_rows("fp32")
    rows.open(1, 100)
    rows.read(1, np.arange(3, 13))
    held = [weakref.ref(buffer) for buffer in rows._buffers._arrays.values()]
    rows.open(2, 100)
    rows.step({1: 5})
    gc.disable()
    try:
        assert [ref() for ref in held] == [None] * len(held), "old buffers outlive growth"
        held = [weakref.ref(buffer) for buffer in rows._buffers._arrays.values()]
        del rows
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_a_failure_while_buffers_grow_leaves_the_rows_broken(
    open_rows: Callable[[str], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Any = open_rows("fp32")
    rows.open(1, 1000)
    rows.read(1, np.arange(3, 13))
    assert not rows.broken
    made = iter(range(3))

    def fail(*_: Any) -> Any:
        if next(made) == 2:
            raise MemoryError
        return np.zeros((1, 2, 512, 16), np.float32)

    monkeypatch.setattr(CacheLayout, "zeros", fail)
    with pytest.raises(MemoryError):
        rows.read(1, np.arange(3, 280))
    assert rows.broken


def test_a_failure_while_rows_change_places_leaves_them_broken(
    open_rows: Callable[[str], Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Any = open_rows("fp32")
    for key in (1, 2, 3):
        rows.open(key, 100)
        rows.read(key, np.arange(3, 13))
    swap = rows._buffers.swap

    def fail(*places: int) -> None:
        swap(*places)
        raise PackageError("onnxruntime failed")

    monkeypatch.setattr(rows._buffers, "swap", fail)
    with pytest.raises(PackageError):
        rows.step({2: 5})
    assert rows.broken


def test_bound_steps_fail_with_a_sentence(package_fp32: Path) -> None:
    opened = open_session(package_fp32 / "model.onnx", CPU, threads=1)
    bound = BoundGraph(opened.session, {})
    bound.bind(CacheLayout.of(opened.session).buffers(1, 8))
    with pytest.raises(PackageError, match="onnxruntime failed while running the graph"):
        bound.run(np.array([[999_999]]), np.ones((1, 1), np.int64))
