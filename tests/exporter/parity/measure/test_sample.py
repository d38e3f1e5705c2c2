"""What is read of a model, by its size, and that the report says so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llama_onnx.exporter.parity import prove as prove_module
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.prompts import make_prompts
from llama_onnx.exporter.parity.measure.sample import FULL, REDUCED, Sample, choose_sample
from llama_onnx.exporter.parity.measure.shipped import NO_PROMPTS, PromptSet, run_shipped
from llama_onnx.exporter.parity.prove import prove
from llama_onnx.exporter.parity.report import words
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.situations import DECODE, LENGTHS, try_situation
from llama_onnx.targets.progress import SILENT
from tests.support.parity import Make, maker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("sample"))


def test_less_is_read_of_a_large_model_unless_the_user_asks_for_more() -> None:
    assert choose_sample(2_999_999_999) == FULL
    assert choose_sample(3_000_000_000) == REDUCED
    assert choose_sample(7 * 10**9, thorough=True) == FULL
    assert choose_sample(7 * 10**9, tokens=64) == FULL
    assert choose_sample(7 * 10**9, prompt_tokens=9) == Sample(9, 9, 64, 1024)
    # The first passage is long enough for all lengths.
    assert REDUCED.prompt_tokens + REDUCED.tokens >= max(LENGTHS)


def test_the_report_says_what_was_sampled(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    package, source = made("int4")
    reduced = Sample(20, 8, 4, 400, reduced=True)
    monkeypatch.setattr(prove_module, "choose_sample", lambda *_, **__: reduced)
    report = prove(package, open_checkpoint(source), certify=True)
    assert [p.prompt for p in report.passages] == [20, 8, 8, 8]
    assert {len(p.ids) - p.prompt for p in report.passages} == {4}
    assert report.positions == 60
    assert report.fidelity is not None and report.fidelity.shipped.positions <= 400
    content = json.loads(report.to_json())
    assert content["sample"]["reduced"] is True and content["sample"]["other_prompt_tokens"] == 8
    certificate = json.loads((package / "parity" / "certificate.json").read_text("utf-8"))
    assert certificate["validated"]["sample"] == content["sample"]
    assert words.sampled(report.sample).startswith("20 tokens of the first prompt, 8 of each other")
    assert words.sampled(FULL) == words.sampled(None) == ""


def test_the_report_says_how_long_each_stage_took(made: Make) -> None:
    package, source = made("fp32")
    report = prove(package, open_checkpoint(source), tokens=2, longest=8)
    seconds = json.loads(report.to_json())["seconds"]
    assert {"shipped", "original", "package", "graph", "weights", "figures"} <= set(seconds)
    assert all(value >= 0 for value in seconds.values()) and seconds["shipped"] > 0


@pytest.mark.parametrize("name", ["int4", "int4-last"])
def test_what_is_seen_while_continuing_is_what_the_situation_gives(made: Make, name: str) -> None:
    """Bit by bit: the greedy steps are those of "token by token", which are not run again."""
    package, source = made(name)
    subject = open_subject(package, open_checkpoint(source))
    prompts = make_prompts(package, subject.weights.config, tokens=6, longest=9)
    shipped = run_shipped(subject, PromptSet(prompts, 6), NO_PROMPTS, (), [DECODE], SILENT)
    recorded = shipped.observations["decode"]
    graph = GraphSession.open(package)
    again = list(try_situation(DECODE, graph, shipped.passages))
    assert len(recorded) == len(again) == len(prompts) * 7
    for one, other in zip(recorded, again, strict=True):
        assert one.passage == other.passage
        assert np.array_equal(one.positions, other.positions)
        assert np.array_equal(one.logits, other.logits)
