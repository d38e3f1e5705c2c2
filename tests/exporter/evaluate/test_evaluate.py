"""The command `evaluate`: figures that one pass with other code has too, and a run resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.evaluate import corpus, shards
from llama_onnx.exporter.evaluate.corpus import open_corpus
from llama_onnx.exporter.evaluate.evaluator import Evaluator
from llama_onnx.exporter.evaluate.shards import Work, evaluate
from llama_onnx.exporter.evaluate.totals import Totals
from llama_onnx.exporter.parity.measure.evaluation import built_in
from llama_onnx.runtime.bundles.card import write_card
from llama_onnx.runtime.measure.certificate import read_certificate
from llama_onnx.runtime.measure.claims import claimed_evaluation
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.metrics import NO_TARGET, compare
from llama_onnx.targets.package import ModelPackage
from tests.support.faults import edit

LENGTH = 24


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a few dozen tokens."""
    monkeypatch.setattr(corpus, "SHARD_BYTES", 60)
    monkeypatch.setattr(corpus, "_LONGEST_LINE", 60)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(built_in())[:1500], encoding="utf-8")
    return path


def source(package: Path) -> Path:
    return package.parent / "checkpoint"


def run(package: Path, text: Path, *options: str) -> Any:
    given = ["evaluate", str(package), "--reference", str(source(package)), "--text", str(text)]
    journal = str(text.with_suffix(".journal"))
    return CliRunner().invoke(main, [*given, "--journal", journal, *options])


@pytest.mark.usefixtures("small")
def test_shards_equal_one_pass_by_transformers_and_the_other_measure(
    package: Path, text: Path
) -> None:
    """The original is transformers' whole model, the figures are those of `compare`."""
    result = run(package, text, "--length", str(LENGTH), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    evaluator = Evaluator(package, HuggingFaceCheckpoint.open(source(package)), LENGTH)
    model = AutoModelForCausalLM.from_pretrained(source(package), dtype=torch.float32)
    graph = GraphSession.open(package)
    pairs, nats = [], []
    cut = open_corpus(text).shards
    assert len(cut) > 15
    for shard in cut:
        for ids in evaluator._passages(shard.read(text)):
            with torch.inference_mode():
                logits = model(torch.from_numpy(ids)[None]).logits[0]
            labels = torch.from_numpy(ids[1:])
            nats.append(torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="none"))
            pairs.append((logits.numpy(), graph.step(ids)[0], np.append(ids[1:], NO_TARGET)))
    whole = compare(pairs)
    figures = found["figures"]
    assert figures["positions"] == whole.positions > 400
    assert figures["passages"] == len(pairs)
    # Layer by layer and whole differ by rounding in float32.
    assert figures["mean_kl"]["value"] == pytest.approx(whole.mean_kl, rel=1e-4)
    assert figures["max_kl"] == pytest.approx(whole.max_kl, rel=1e-4)
    assert figures["same_top1"]["value"] == pytest.approx(whole.same_top1, abs=2 / whole.positions)
    assert figures["perplexity_ratio"]["value"] == pytest.approx(whole.perplexity_ratio, rel=1e-5)
    perplexity = float(torch.cat(nats).double().mean().exp())
    assert figures["original_perplexity"]["value"] == pytest.approx(perplexity, rel=1e-5)
    low, value, high = (figures["mean_kl"][name] for name in ("low", "value", "high"))
    assert low < value < high


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_200_shards_add_up_to_one_pass_over_the_same_logits(package: Path, text: Path) -> None:
    text.write_text("\n".join(built_in() * 4)[:13_500], encoding="utf-8")
    assert len(open_corpus(text).shards) >= 200
    found = evaluate(Work(package, source(package), text, LENGTH), text.with_suffix(".j"))
    evaluator = Evaluator(package, HuggingFaceCheckpoint.open(source(package)), LENGTH)
    whole = compare(
        (pair.original, pair.package, np.append(pair.ids[1:], NO_TARGET))
        for shard in open_corpus(text).shards
        for pair in evaluator.pairs(shard.read(text))
    )
    assert found.figures.mean_kl.value == pytest.approx(whole.mean_kl, abs=1e-9, rel=1e-9)
    assert found.figures.same_top1.value == pytest.approx(whole.same_top1, abs=1e-12)
    assert whole.perplexity_ratio is not None
    ratio = found.figures.perplexity_ratio.value
    assert ratio == pytest.approx(whole.perplexity_ratio, abs=1e-9)


@pytest.mark.usefixtures("small")
def test_a_run_that_ended_early_goes_on(
    package: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, journal = Work(package, source(package), text, LENGTH), text.with_suffix(".j")
    whole = evaluate(work, journal)
    assert not journal.exists()
    measured: list[str] = []

    class Counting(Evaluator):
        def measure(self, text: str) -> Totals:
            if len(measured) == 5:
                raise KeyboardInterrupt
            measured.append(text)
            return super().measure(text)

    monkeypatch.setattr(shards, "Evaluator", Counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work, journal)
    before = list(measured)
    measured.extend([""])  # so that nothing is interrupted again
    assert evaluate(work, journal) == whole
    again = measured[6:]
    assert not set(before) & set(again)
    assert len(before) + len(again) == len(open_corpus(text).shards)
    other = run(package, text, "--length", "30")
    assert other.exit_code == 0  # another journal


def test_a_journal_of_other_work_is_refused(package: Path, text: Path) -> None:
    journal = text.with_suffix(".journal")

    def one(*arguments: Any) -> Iterator[tuple[int, bytes]]:
        yield next(shards.measure_here(*arguments))
        raise KeyboardInterrupt

    work = Work(package, source(package), text, LENGTH)
    with pytest.raises(KeyboardInterrupt):
        evaluate(work, journal, measure=one)
    result = run(package, text, "--length", "30")
    assert result.exit_code == 2 and "length changed since it was begun" in result.stderr
    assert run(package, text, "--length", "30", "--force").exit_code == 0


def test_a_model_that_computes_nan_is_named(package_fp32: Path, text: Path) -> None:
    package = Path(shutil.copytree(package_fp32, text.parent / "tiny-fp32"))
    edit(package, "model.embed_tokens.weight", lambda rows: rows.fill(np.nan))
    options = ["--reference", str(source(package_fp32)), "--text", str(text)]
    result = CliRunner().invoke(main, ["evaluate", str(package), *options])
    assert result.exit_code == 1 and "not numbers" in result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_arguments_are_one_sentence(package: Path, text: Path) -> None:
    for content, words in ((b"", "is empty"), (b"\xff\xfe", "not UTF-8"), (b" \n ", "two tokens")):
        text.write_bytes(content)
        result = run(package, text)
        assert result.exit_code == 2 and words in result.stderr, content
    text.write_text("the quick brown fox")
    result = run(package, text, "--certify")
    assert result.exit_code == 1 and "has no certificate" in result.stderr


def test_the_figures_go_into_certificate_and_card(package: Path, text: Path) -> None:
    pytest.importorskip("huggingface_hub")
    certified = Path(shutil.copytree(package, text.parent / "tiny-int4"))
    reference = ["--reference", str(source(package))]
    done = CliRunner().invoke(main, ["validate", str(certified), *reference, "--certify"])
    assert done.exit_code == 0, done.output
    options = [*reference, "--text", str(text), "--certify"]
    result = CliRunner().invoke(main, ["evaluate", str(certified), *options])
    assert result.exit_code == 0, result.output
    assert "95 % confidence" in result.stdout and "recorded in the certificate" in result.stdout
    opened = ModelPackage.open(certified)
    assert opened.verify() == []
    certificate = read_certificate(certified)
    found = claimed_evaluation(opened, certificate)
    assert found is not None and found.text == "corpus.txt"
    assert found.figures.mean_kl.low < found.figures.mean_kl.value
    card = write_card(opened, certificate, "tiny", "tiny")
    assert "**Evaluated over a corpus**, `corpus.txt`" in card
    assert found.figures.mean_kl.text(".3g") in card
    verified = CliRunner().invoke(main, ["verify", str(certified)])
    assert verified.exit_code == 0, verified.output
