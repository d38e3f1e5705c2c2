"""However a sound graph is fed, a position means the same; and each way is what it is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pytest

from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.situations import (
    DECODE,
    LENGTHS,
    LONG_CONTEXT,
    SITUATIONS,
    Passage,
    Situation,
    merge,
    run_plainly,
    situations_of,
    try_situation,
)
from llama_onnx.runtime.memory import forget_pages
from llama_onnx.targets.errors import PackageError, ProviderError
from tests.support.packages import make_package

ALL = {situation.name: situation for situation in (*SITUATIONS, LONG_CONTEXT)}
RNG = np.random.default_rng(0)
PASSAGES = [Passage(RNG.integers(0, 288, length), length - 12) for length in (60, 140, 45, 77)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("situations"), "fp32")


@pytest.fixture(scope="module")
def graph(package: Path) -> GraphSession:
    return GraphSession.open(package)


@pytest.mark.parametrize("name", ALL)
def test_every_situation_gives_the_logits_of_one_pass(graph: GraphSession, name: str) -> None:
    expected = [graph.step(passage.ids)[0] for passage in PASSAGES]
    found = list(try_situation(ALL[name], graph, PASSAGES))
    assert found
    for entry in found:
        reference = expected[entry.passage][entry.positions]
        assert np.abs(entry.logits - reference).max() < 1e-4


SHORT = {s.name: s for s in situations_of(shared_buffer=True, short=True)}


@pytest.mark.parametrize("name", SHORT)
def test_short_situations_give_the_logits_of_one_pass(graph: GraphSession, name: str) -> None:
    expected = [graph.step(passage.ids)[0] for passage in PASSAGES]
    for entry in try_situation(SHORT[name], graph, PASSAGES):
        reference = expected[entry.passage][entry.positions]
        assert np.abs(entry.logits - reference).max() < 1e-4


def test_short_situations_are_as_many_and_keep_lengths_and_paddings() -> None:
    assert list(SHORT) == [s.name for s in SITUATIONS]
    changed = {n for n in SHORT if seen(SHORT[n]) != seen(ALL[n])}
    assert changed == {"left_padding", "right_padding", "two_at_once"}
    batch = SHORT["left_padding"].program(PASSAGES)
    assert len(set(batch[0].mask.sum(axis=1))) == 4 and len(batch) == 4
    assert max(position for _, position in seen(SHORT["left_padding"])) < 16


def test_merged_programs_run_equal_steps_once_and_give_the_same(graph: GraphSession) -> None:
    plain = [s for s in SITUATIONS if s.run is run_plainly]
    programs = [s.program(PASSAGES) for s in plain]
    merged, owners = merge(programs)
    # The longest passage in one pass (prefill, rewind), its 128 tokens (decode, lengths), and one
    # token (chunks, lengths).
    assert sum(map(len, programs)) - len(merged) == 3
    assert sorted(map(len, owners))[-3:] == [2, 2, 2] and len(owners) == len(merged)
    for number, program in enumerate(programs):
        alone = {
            (o.passage, tuple(o.positions)): o.logits for o in run_plainly(graph, list(program))
        }
        chosen = [
            (o.passage, tuple(o.positions), o.logits)
            for step, o in _numbered(graph, merged)
            if number in owners[step]
        ]
        assert {(passage, positions) for passage, positions, _ in chosen} == set(alone)
        for passage, positions, logits in chosen:
            assert np.array_equal(logits, alone[passage, positions])


def _numbered(graph: GraphSession, program: Any) -> Any:
    """Yield the number of each step with its observations."""
    numbers = [number for number, step in enumerate(program) for _ in step.rows]
    return zip(numbers, run_plainly(graph, program), strict=True)


def seen(situation: Situation) -> set[tuple[int, int]]:
    steps = situation.program(PASSAGES)
    return {
        (row.passage, row.first + offset)
        for step in steps
        for row in step.rows
        for offset in range(len(range(*row.outputs.indices(step.ids.shape[1]))))
    }


def test_prefill_and_decode_see_every_position() -> None:
    every = {(i, n) for i, passage in enumerate(PASSAGES) for n in range(len(passage.ids))}
    assert seen(ALL["prefill"]) == seen(DECODE) == every


def test_the_ways_of_feeding_are_what_they_are_called() -> None:
    assert [s.ids.shape for s in ALL["lengths"].program(PASSAGES)] == [(1, n) for n in LENGTHS]
    decode = DECODE.program(PASSAGES[:1])
    assert [step.ids.shape[1] for step in decode] == [48] + [1] * 12
    assert [step.past for step in decode] == [None, *range(12)]
    left, right = (ALL[f"{side}_padding"].program(PASSAGES)[0] for side in ("left", "right"))
    assert sorted(left.mask.sum(axis=1)) == sorted(right.mask.sum(axis=1)) != [45] * 4
    assert left.mask[:, -1].all() and right.mask[:, 0].all()
    assert not left.mask.all() and not right.mask.all()
    _, again = ALL["rewind"].program(PASSAGES)
    assert (again.past, again.keep, again.ids.shape, again.mask.shape) == (0, 70, (1, 70), (1, 140))


def test_a_long_passage_is_crossed_at_its_edges() -> None:
    passage = Passage(RNG.integers(0, 288, 2100), 2100)
    steps = LONG_CONTEXT.program([passage])
    assert [step.rows[0].first for step in steps] == [2046, 2047, 2048, 2097, 2098, 2099]
    assert [step.ids.shape[1] for step in steps] == [2047, 1, 1, 49, 1, 1]


def test_a_graph_that_gives_up_says_in_which_situation(graph: GraphSession) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            return getattr(graph.raw, name)

        def run(self, *_: object) -> None:
            raise ValueError("no kernel for this\nand a trace of it")

    with pytest.raises(PackageError) as caught:
        list(try_situation(DECODE, GraphSession(Broken()), PASSAGES))
    assert str(caught.value) == (
        "onnxruntime failed while running the graph: no kernel for this (situation: token by token)"
    )


def test_a_folder_without_a_graph_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"onnxruntime refuses .*model"):
        GraphSession.open(tmp_path / "ä 日本")


def test_an_onnxruntime_that_cannot_say_where_nodes_run_is_too_old(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ort.InferenceSession.__base__
    monkeypatch.delattr(base, "get_provider_graph_assignment_info")
    with pytest.raises(ProviderError, match=r"onnxruntime [\d.]+ cannot report .* 1\.24 or newer"):
        GraphSession.open(package)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked to forget pages")
def test_pages_of_a_mapped_file_are_forgotten_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "ä 日本.data"
    content = np.random.default_rng(0).integers(0, 256, 32 << 20, np.uint8)
    content.tofile(file)
    os.sync()  # a page that is not on the disk yet cannot be dropped
    mapped = np.memmap(file, np.uint8, mode="c")
    assert mapped.sum() == content.sum()
    mapped[5] = content[5] ^ 1  # written in this process alone, and not to be lost
    resident = psutil.Process().memory_info().rss
    forget_pages(file)
    assert psutil.Process().memory_info().rss < resident - (24 << 20)
    assert mapped[5] == content[5] ^ 1
    np.testing.assert_array_equal(mapped[6:], content[6:])
