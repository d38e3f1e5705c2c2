"""Our engine as a model of lm-eval, against lm-eval's own model of transformers."""

from __future__ import annotations

import json
import math
import shutil
import socket
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.exporter.cli import main
from llama_onnx.exporter.evaluate.tasks import rating
from llama_onnx.exporter.evaluate.tasks.rating import Pair, rate_by_graph, rate_by_layers
from llama_onnx.exporter.evaluate.tasks.templates import render
from llama_onnx.runtime.bundles.card import write_card
from llama_onnx.runtime.measure.certificate import read_certificate
from llama_onnx.runtime.measure.claims import claimed_scores
from llama_onnx.runtime.measure.graph_session import Cache, GraphSession
from llama_onnx.runtime.measure.metrics import Ids, Logits
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT
from tests.support.lm_tasks import CHOICE, rows, write_task

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

CONTEXT = 256  # of the tiny models


def source(package: Path) -> Path:
    return package.parent / "checkpoint"


@pytest.fixture(scope="module")
def theirs(package_fp32: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(source(package_fp32), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source(package_fp32))
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=CONTEXT)


@pytest.fixture(scope="module")
def ours(package_fp32: Path) -> Any:
    from llama_onnx.exporter.evaluate.tasks.harness import SubjectModel
    from llama_onnx.exporter.evaluate.tasks.scoring import _open

    subject, _ = _open(package_fp32, None)
    return SubjectModel(subject, SILENT)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def logits_of(package: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(source(package), dtype=torch.float32)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def pairs_of(package: Path) -> tuple[list[Pair], list[tuple[float, bool]]]:
    """Pairs, some with one context, one greedy; and what PyTorch's log-softmax says of them."""
    context = (1, 20, 30, 40, 50)
    greedy: list[int] = []
    for _ in range(4):
        greedy.append(int(logits_of(package, [*context, *greedy])[-1].argmax()))
    pairs = [
        Pair(context, tuple(greedy)),
        Pair(context, (*greedy[:3], (greedy[3] + 1) % 288)),
        Pair(context, (7,)),
        Pair((1,), tuple(range(100, 140))),
        Pair(context, tuple(greedy[:1])),
    ]
    expected = []
    for pair in pairs:
        read = [*pair.context, *pair.continuation]
        rows = logits_of(package, read)[len(pair.context) - 1 : -1].double().log_softmax(-1)
        ids = torch.tensor(pair.continuation)
        expected.append(
            (float(rows.gather(1, ids[:, None]).sum()), bool((rows.argmax(-1) == ids).all()))
        )
    return pairs, expected


class LastOnly(GraphSession):
    """A graph with logits of the last position only."""

    def step(self, ids: Ids, cache: Cache | None = None) -> tuple[Logits, Cache]:
        logits, cache = super().step(ids, cache)
        return logits[-1:], cache


@pytest.mark.parametrize("kind", ["graph", "chunks", "last", "layers"])
def test_ratings_are_sums_of_log_softmax(
    package_fp32: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, expected = pairs_of(package_fp32)
    assert [greedy for _, greedy in expected] == [True, False, False, False, True]
    if kind == "chunks":
        monkeypatch.setattr(rating, "_CHUNK", 3)
    if kind == "layers":
        monkeypatch.setattr(rating, "_TOKENS", 12)
        rate: Any = partial(rate_by_layers, HuggingFaceCheckpoint.open(source(package_fp32)))
    else:
        opened = LastOnly if kind == "last" else GraphSession
        rate = partial(rate_by_graph, opened.open(package_fp32))
    found = dict(rate(pairs))
    assert sorted(found) == list(range(len(pairs)))
    for number, (logprob, greedy) in enumerate(expected):
        assert found[number].logprob == pytest.approx(logprob, abs=1e-4)
        assert found[number].greedy == greedy


def test_likelihoods_are_those_of_lm_evals_own_model(ours: Any, theirs: Any) -> None:
    long = "the quick brown fox jumps over the lazy dog " * 40
    given = [
        ("the quick", " brown fox"),
        ("the quick", " dog"),
        ("the quick ", "brown"),
        ("", "the lazy dog"),
        (long, " and the fox"),
    ]
    assert len(ours.tok_encode(long)) > CONTEXT
    asked = requests("loglikelihood", given)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    for (logprob, greedy), (right, right_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(right, abs=1e-4) and greedy == right_greedy


def test_rolling_windows_are_those_of_lm_evals_own_model(ours: Any, theirs: Any) -> None:
    long = "the quick brown fox jumps over the lazy dog " * 40
    asked = requests("loglikelihood_rolling", [("the lazy dog",), (long,)])
    assert len(ours.tok_encode(long)) > 2 * CONTEXT  # three windows
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    found = ours.loglikelihood_rolling(asked, disable_tqdm=True)
    assert found == pytest.approx([float(value) for value in expected], abs=1e-3, rel=1e-6)


def test_answers_are_those_of_lm_evals_own_model(ours: Any, theirs: Any) -> None:
    whole = {"until": [], "max_gen_toks": 24, "do_sample": False}
    prompts = ["the quick brown", "over the lazy"]
    first = requests("generate_until", [(prompt, dict(whole)) for prompt in prompts])
    expected = theirs.generate_until(first, disable_tqdm=True)
    assert ours.generate_until(first) == expected and all(map(len, expected))
    stop = expected[0][5:7]
    again = requests("generate_until", [(prompts[0], {**whole, "until": [stop]})])
    assert ours.generate_until(again) == theirs.generate_until(again, disable_tqdm=True)
    assert ours.generate_until(again) == [expected[0].split(stop)[0]]


def run(package: Path, folder: Path, *options: str) -> Any:
    return CliRunner().invoke(main, ["evaluate", str(package), "--tasks", str(folder), *options])


def correct(model: Any, tokenizer: Any) -> list[float]:
    """Whether transformers rates the right choice highest, for each row."""
    found = []
    for row in rows():
        sums = []
        for choice in row["choices"]:
            context = tokenizer(f"Q: {row['question']}\nA:").input_ids
            ids = tokenizer(f"Q: {row['question']}\nA: {choice}").input_ids
            with torch.inference_mode():
                nats = model(torch.tensor([ids])).logits[0, len(context) - 1 : -1].log_softmax(-1)
            right = torch.tensor(ids[len(context) :])
            sums.append(float(nats.gather(1, right[:, None]).sum()))
        found.append(float(int(np.argmax(sums)) == row["answer"]))
    return found


def test_scores_and_their_difference(
    package: Path, package_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = write_task(tmp_path / "tasks")
    result = run(package, folder, "--reference", str(source(package)), "--json")
    assert result.exit_code == 0, result.output
    (task,) = json.loads(result.stdout)["task_scores"]
    (score,) = task["scores"]
    model = AutoModelForCausalLM.from_pretrained(source(package), dtype=torch.float32)
    original = correct(model, AutoTokenizer.from_pretrained(source(package)))
    assert 0 < sum(original) < len(original)
    assert (task["task"], task["documents"], score["metric"]) == ("choice", 12, "acc")
    mean = float(np.mean(original))
    error = float(np.std(original, ddof=1)) / math.sqrt(12)
    assert score["original"]["value"] == pytest.approx(mean)
    assert score["original"]["high"] == pytest.approx(mean + 1.959964 * error)
    assert score["difference"]["value"] == pytest.approx(score["package"]["value"] - mean)
    # The same weights: no document differs.
    same = run(package_fp32, folder, "--reference", str(source(package)), "--json")
    (score,) = json.loads(same.stdout)["task_scores"][0]["scores"]
    assert score["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_all_kinds_of_tasks_in_words(package: Path, tmp_path: Path) -> None:
    data = {name: CHOICE[name] for name in ("dataset_path", "dataset_kwargs", "test_split")}
    folder = write_task(tmp_path, num_fewshot=2)
    text = {**data, "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}"}
    rolling = {"doc_to_text": "", "doc_to_target": "{{question}}"}
    generation = {"until": ["\n"], "max_gen_toks": 4}
    write_task(folder, {**text, "task": "b-last", "output_type": "loglikelihood"})
    write_task(folder, {**data, **rolling, "task": "c", "output_type": "loglikelihood_rolling"})
    answer = {**text, "task": "d", "output_type": "generate_until"}
    write_task(folder, {**answer, "generation_kwargs": generation})
    result = run(package, folder, "--reference", str(source(package)))
    assert result.exit_code == 0, result.output
    for words in (
        "choice, 12",
        "b-last, 12",
        "c, 12",
        "d, 12",
        "acc ",
        "perplexity",
        "exact_match",
    ):
        assert words in result.stdout, result.stdout
    assert "the original is not scored on d, which asks for answers" in result.stderr
    only = run(package, folder, "--task", "d")
    assert only.exit_code == 0 and "choice" not in only.stdout
    assert "not scored" not in only.stderr


def test_templates_have_lm_evals_texts() -> None:
    from lm_eval.utils import apply_template

    row = {"question": "why?", "choices": ["a", "b"], "n": 3, "none": None}
    for template in (
        "Q: {{question}}\nA:\n",
        "{% for c in choices %}\n  {{ loop.index }}. {{ c }}\n{% endfor %}\n",
        "{{ choices }} {{ choices[1] }} {{ n + 1 }} {{ none }}",
        "{{ question.strip().upper() | replace('?', '!') }}  ",
        "{{ {'a': 1}[choices[0]] }}{% if n > 2 %} more{% endif %}",
    ):
        assert render(template, row) == apply_template(template, row)


def test_faults_are_one_sentence(package: Path, tmp_path: Path) -> None:
    def refused(folder: Path, *options: str) -> str:
        result = run(package, folder, *options)
        assert result.exit_code == 2 and "Traceback" not in result.output
        return str(result.stderr.strip().splitlines()[-1])

    folder = write_task(tmp_path / "a", doc_to_text="{{ ''.__class__ }}")
    assert "template" in refused(folder)
    folder = write_task(tmp_path / "b", doc_to_choice="{{ question }}")
    assert "lm-eval cannot score choice" in refused(folder)
    folder = write_task(tmp_path / "c", dataset_path="squad")
    assert "hub" in refused(folder)
    (tmp_path / "d").mkdir()
    assert "has no task" in refused(tmp_path / "d")


def test_the_scores_go_into_certificate_and_card(package: Path, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    certified = Path(shutil.copytree(package, tmp_path / "tiny-int4"))
    reference = ["--reference", str(source(package))]
    done = CliRunner().invoke(main, ["validate", str(certified), *reference, "--certify"])
    assert done.exit_code == 0, done.output
    result = run(certified, write_task(tmp_path / "tasks"), *reference, "--certify")
    assert result.exit_code == 0, result.output
    opened = ModelPackage.open(certified)
    assert opened.verify() == []
    certificate = read_certificate(certified)
    (found,) = claimed_scores(opened, certificate)
    assert found.task == "choice" and found.scores[0].difference is not None
    card = write_card(opened, certificate, "tiny", "tiny")
    assert "**Task `choice`**" in card and found.scores[0].package.text(".4f") in card
    verified = CliRunner().invoke(main, ["verify", str(certified)])
    assert verified.exit_code == 0, verified.output
