"""`bench` over our own engine: answers at once, the turns of a chat, and the bytes of caches."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import current_thread
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from llama_onnx.exporter.cli import main
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.bench import together
from llama_onnx.runtime.bench.bench import bench
from llama_onnx.runtime.bench.contender import Here, Opening
from llama_onnx.runtime.bench.together import Stream, measure_overlap
from llama_onnx.runtime.bench.turns import Script
from llama_onnx.runtime.engine import engine as engine_module
from llama_onnx.runtime.engine.schedule import Capacity
from llama_onnx.runtime.engine.shared_rows import SharedRows
from llama_onnx.runtime.engine.single_rows import GrowingRows
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.answers import open_engine
from tests.support.packages import alter_package

OURS = "--engine", "onnxruntime", "--threads", "1"
POSITION_BYTES = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size of a head, float32


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


def open_here(package: Path) -> Here:
    return Here(Opening(package, "onnxruntime", 1, None, False))


@pytest.fixture(scope="module")
def measured(package: Path) -> dict[str, Any]:
    """Everything about the int4 package, as JSON."""
    sizes = ("--prompt-tokens", "40", "--new-tokens", "12", "--repeats", "3", "--turns", "3")
    result = run(package, *OURS, *sizes, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_every_run_is_there_and_has_its_tokens(measured: dict[str, Any]) -> None:
    runs = measured["runs"]
    assert [len(one["step_seconds"]) for one in runs["single"]] == [12, 12, 12]
    assert [[row["streams"] for row in rows] for rows in runs["streams"]] == [[1, 2, 4, 8]] * 3
    assert [[turn["new_tokens"] >= 1 for turn in chat] for chat in runs["turns"]] == [
        [True] * 3
    ] * 3
    for row in (row for rows in runs["streams"] for row in rows):
        # Between two tokens that count is a gap, and each stream has at least `together` of them.
        assert 2 <= row["together"] <= 12 + 8 * (row["streams"] - 1)
        assert len(row["gaps"]) >= row["streams"] * (row["together"] - 1)


def test_percentiles_are_numpys(measured: dict[str, Any]) -> None:
    gaps = [gap for one in measured["runs"]["single"] for gap in one["step_seconds"][1:]]
    found = measured["inter_token_seconds"]
    assert found["count"] == len(gaps) == 33
    assert found["p50"] == pytest.approx(np.quantile(gaps, 0.5))
    assert found["p99"] == pytest.approx(np.quantile(gaps, 0.99))
    for index, row in enumerate(measured["streams"]):
        gaps = [gap for rows in measured["runs"]["streams"] for gap in rows[index]["gaps"]]
        assert row["inter_token_seconds"]["p99"] == pytest.approx(np.quantile(gaps, 0.99))
        rates = [rows[index]["rate"] for rows in measured["runs"]["streams"]]
        ones = [rows[0]["rate"] for rows in measured["runs"]["streams"]]
        assert row["rate"]["median"] == sorted(rates)[1]
        assert row["ratio"]["most"] == pytest.approx(np.divide(rates, ones).max())


def test_caches_have_the_bytes_of_their_positions(measured: dict[str, Any]) -> None:
    assert measured["caches"]["position_bytes"] == POSITION_BYTES
    one, *_, eight = measured["streams"]
    assert one["cache_bytes"] >= 52 * POSITION_BYTES
    assert eight["cache_bytes"] >= 8 * 52 * POSITION_BYTES
    # Eight rows, none of which needs more than the prompt, the answer and what it may be ahead by.
    assert eight["cache_bytes"] <= 8 * (52 + 7 * 8) * POSITION_BYTES
    assert measured["caches"]["kept_bytes"] >= 8 * 40 * POSITION_BYTES
    assert measured["caches"]["kept_bytes"] <= measured["caches"]["most_bytes"]


def test_streams_are_steps_of_all_rows(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    step = SharedRows.step

    def counted(self: SharedRows, tokens: Any, options: Any = None) -> Any:
        widths.append(len(tokens))
        return step(self, tokens, options)

    monkeypatch.setattr(SharedRows, "step", counted)
    here = open_here(package)
    for count in (1, 2, 4, 8):
        widths.clear()
        found = here.streams(count, 40, 20)
        # Every token that counts, but a stream's first, is one of a step of all streams.
        assert widths.count(count) >= found.together - 1
        assert len(found.gaps) >= count * (found.together - 1)
        assert sum(widths) >= len(found.gaps)
        assert max(widths) == count


def test_rows_that_grow_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    target, options = get_target("portable"), Options("fp32")
    package = export_package(source, tmp_path / "portable", target, options).package
    threads: set[str] = set()
    allocated = GrowingRows.allocated.fget  # type: ignore[attr-defined]

    def noted(self: GrowingRows) -> int:
        threads.add(current_thread().name)
        return int(allocated(self))

    monkeypatch.setattr(GrowingRows, "allocated", property(noted))
    found = open_here(package).streams(2, 20, 12)
    assert found.streams == 2
    assert found.cache_bytes >= 2 * 20 * POSITION_BYTES
    # Caches belong to the engine's thread: another would see them change while it looks.
    assert threads == {"llama-onnx engine"}


def test_streams_use_what_was_read_and_draft_nothing(package: Path) -> None:
    with open_engine(package) as engine:
        asked = together.request(engine, np.arange(3, 13, dtype=np.int32), 5)
    # Drafts that are right would make a single answer look faster than several.
    assert (asked.reuse, asked.speculate, asked.max_new_tokens) == (True, False, 5)


def test_only_what_was_at_once_counts() -> None:
    early = Stream(0.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    late = Stream(0.0, [3.0, 3.5, 4.0, 4.5, 5.0, 9.0])
    found = measure_overlap([early, late])
    # From 3.0, the last one's first token, to 6.0, the first one's last.
    assert found is not None and found.together == 4
    assert found.rate == pytest.approx(1.0 + 2.0)
    assert sorted(found.gaps) == [0.5] * 4 + [1.0] * 3


def test_streams_that_were_never_at_once_are_an_error(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure_overlap([Stream(0.0, [1.0, 2.0]), Stream(0.0, [3.0, 4.0])]) is None
    monkeypatch.setattr(together, "measure_overlap", lambda *_, **__: None)
    with pytest.raises(LlamaOnnxError, match="2 streams were not generated at the same time"):
        open_here(package).streams(2, 20, 4)


# A chat


@pytest.fixture(scope="module")
def long_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a context of 1,024."""
    folder = tmp_path_factory.mktemp("long")
    config = replace(tiny.GQA, max_position_embeddings=1024)
    source = tiny.write_huggingface(folder / "source", config)
    options = Options("int4", quantizer="rtn")
    return export_package(source, folder / "long", get_target("cpu"), options).package


def test_the_tenth_turn_of_a_chat_reads_its_message_only(long_package: Path) -> None:
    measured = bench(long_package, repeats=2, new_tokens=4, threads=1, engine="onnxruntime")
    assert [turn.turn for turn in measured.turns] == list(range(1, 11))
    for chat in measured.runs.turns:
        assert chat[0].reused_tokens == 0
        for before, turn in pairwise(chat):
            # What was read before is known; texts of random bytes may be other tokens when read.
            assert before.prompt_tokens <= turn.reused_tokens < turn.prompt_tokens
    assert "a chat" not in "".join(measured.left_out)


def test_without_a_chat_template_turns_are_token_ids(package: Path, tmp_path: Path) -> None:
    bare = alter_package(package, tmp_path / "bare", chat_template="")
    ours, genai = (
        bench(bare, repeats=2, new_tokens=4, threads=1, engine=engine)
        for engine in ("onnxruntime", "genai")
    )
    for measured in (ours, genai):
        assert any("turns are token ids" in text for text in measured.left_out)
        assert [turn.turn for turn in measured.turns] == list(range(1, 11))
    (chat, again), sizes = ours.runs.turns, [turn.prompt_tokens for turn in genai.turns]
    assert [turn.prompt_tokens for turn in chat] == sizes
    message = sizes[0]
    for turn in (*chat[1:], *again[1:]):
        # All but the message and the last token of the answer, which no step has read.
        assert turn.reused_tokens == turn.prompt_tokens - message - 1
    assert [one[0].reused_tokens for one in (chat, again)] == [0, 0]
    assert {turn.reused_tokens for turn in genai.turns} == {0}


def test_a_package_without_a_tokenizer(tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    cpu, options = get_target("cpu"), Options("fp32")
    package = export_package(source, tmp_path / "ids", cpu, options, tokenizer=False).package
    measured = bench(package, repeats=1, new_tokens=4, turns=3, engine="onnxruntime", threads=1)
    assert measured.turns[2].reused_tokens > measured.turns[1].prompt_tokens
    assert any("turns are token ids" in text for text in measured.left_out)


def test_a_short_context_has_fewer_turns_and_says_so(package: Path) -> None:
    result = run(package, *OURS, "--repeats", "1", "--new-tokens", "4", "--streams", "1")
    assert result.exit_code == 0
    assert "do not fit 256 tokens" in " ".join(result.stdout.split())
    assert "first token of turn 10" not in result.stdout


def test_conversations_have_nothing_in_common(package: Path) -> None:
    here, script = open_here(package), Script(2, 3, 4, True, 256)
    first, second = here.chat(1, script), here.chat(2, script)
    assert (first[0].reused_tokens, second[0].reused_tokens) == (0, 0)
    assert first[1].reused_tokens > 0
    again = here.chat(1, script)
    assert again[0].reused_tokens > 0


# What does not fit, and what another engine cannot do


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two answers of 52 tokens, and of what they may be ahead by."""

    def decide(*_: Any, **__: Any) -> Capacity:
        return Capacity(rows=8, positions=2 * (52 + 8), rectangular=True)

    monkeypatch.setattr(engine_module, "decide_capacity", decide)


@pytest.mark.usefixtures("little_memory")
def test_streams_without_room_are_left_out_or_refused(package: Path) -> None:
    sizes = {"prompt_tokens": 40, "new_tokens": 12, "repeats": 1, "turns": 1, "threads": 1}
    measured = bench(package, engine="onnxruntime", **sizes)  # type: ignore[arg-type]
    assert [row.streams for row in measured.streams] == [1, 2]
    left = [text for text in measured.left_out if "streams" in text]
    assert [text.split(":")[0] for text in left] == ["4 streams", "8 streams"]
    assert "there is room for 120 tokens in all" in left[0]
    with pytest.raises(ResourceError, match="not enough memory for 4 caches of 76 tokens"):
        bench(package, engine="onnxruntime", streams=(4,), **sizes)  # type: ignore[arg-type]


def test_genai_says_what_it_cannot(package: Path) -> None:
    options = ("--engine", "genai", "--repeats", "1", "--new-tokens", "4", "--turns", "2", "--json")
    result = run(package, *options)
    found = json.loads(result.stdout)
    assert (found["streams"], found["caches"], found["runs"]["streams"]) == ([], None, [])
    assert any("generates one answer at a time" in text for text in found["left_out"])
    assert found["inter_token_seconds"]["count"] == 3
    assert [turn["reused_tokens"] for turn in found["turns"]] == [0, 0]
