"""A smaller package that drafts: what it may be, and that it changes no answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.runtime.engine.drafting import Speculation
from llama_onnx.runtime.engine.engine import Engine, Limits
from llama_onnx.runtime.engine.events import EndEvent
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import get_target
from tests.support import tiny
from tests.support.answers import (
    CONTEXT,
    ask,
    greedy_text,
    let_every_step_take_as_long,
    random_prompts,
    tokens_of,
)
from tests.support.packages import renew_hashes

PROMPTS = random_prompts(20, 60, 3)
COUNT = 60


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of one layer, with other weights and the same tokens."""
    folder = tmp_path_factory.mktemp("smaller")
    config = replace(tiny.GQA, num_hidden_layers=1)
    source = tiny.write_huggingface(folder / "source", config)
    return export_package(source, folder / "p", get_target("cpu"), Options("fp32")).package


def open_with(
    package: Path, draft: Path, context: int = CONTEXT, cache_bytes: int | None = None
) -> Engine:
    return Engine(
        ModelPackage.open(package),
        CONTEXT,
        threads=1,
        limits=Limits(cache_bytes),
        speculation=Speculation("auto", ModelPackage.open(draft), context),
    )


@pytest.fixture(scope="module")
def engine(package_fp32: Path, smaller: Path) -> Iterator[Engine]:
    with open_with(package_fp32, smaller) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    let_every_step_take_as_long(monkeypatch)


def answers(engine: Engine, count: int = COUNT) -> list[EndEvent]:
    """Return the ends of answers that are as PyTorch's, one after the other."""
    found = []
    for prompt in PROMPTS:
        answer = engine.submit(ask(prompt, count, reuse=False))
        assert tokens_of(answer) == greedy_text(tiny.GQA, prompt, count)
        assert answer.end is not None
        found.append(answer.end)
    return found


def test_a_smaller_package_changes_no_answer(engine: Engine) -> None:
    assert sum(end.drafted_tokens for end in answers(engine)) > 0


def test_the_package_itself_drafts_what_is_accepted(package_fp32: Path) -> None:
    with open_with(package_fp32, package_fp32) as opened:
        opened._loop._speculator._use_ngrams = False  # type: ignore[union-attr]
        ends = answers(opened)
    drafted = sum(end.drafted_tokens for end in ends)
    assert drafted > 10
    assert sum(end.accepted_tokens for end in ends) == drafted


def test_a_context_that_is_shorter_ends_the_drafts_and_not_the_answer(
    package_fp32: Path, smaller: Path
) -> None:
    with open_with(package_fp32, smaller, context=30) as opened:
        answers(opened)


def test_its_cache_is_freed_with_the_answer_and_counted(package_fp32: Path, smaller: Path) -> None:
    """A position takes 768 bytes, and 256 in the draft's cache."""
    with open_with(package_fp32, smaller, cache_bytes=100 * 1024) as opened:
        assert opened.capacity.positions == 100
        tokens_of(opened.submit(ask(PROMPTS[0], COUNT)))
        tokens_of(opened.submit(ask(PROMPTS[2], 1)))  # the loop has dropped the first by now
        draft = opened._loop._speculator._draft  # type: ignore[union-attr]
        assert draft is not None and draft._rows is None


@pytest.mark.slow
def test_several_answers_at_once_and_one_alone(engine: Engine) -> None:
    started = [engine.submit(ask(prompt, COUNT, reuse=False)) for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, started, strict=True):
        assert tokens_of(answer) == greedy_text(tiny.GQA, prompt, COUNT)
    answers(engine)


# What cannot draft


def test_other_tokens_are_refused(package_fp32: Path, smaller: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(smaller, tmp_path / "other"))
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    renew_hashes(other)
    with pytest.raises(UsageError, match=r"its tokenizer is another one .* 2 of them with another"):
        open_with(package_fp32, other)


def test_without_a_tokenizer_it_is_refused(package_fp32: Path, tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    bare = export_package(
        source, tmp_path / "bare", get_target("cpu"), Options("fp32"), tokenizer=False
    ).package
    for package, draft in ((package_fp32, bare), (bare, package_fp32)):
        with pytest.raises(UsageError, match="bare has no tokenizer"):
            open_with(package, draft)


def test_a_cache_that_cannot_be_rewound_is_refused(package_fp32: Path, tmp_path: Path) -> None:
    source = tiny.write_huggingface(tmp_path / "source")
    target = get_target("portable")
    portable = export_package(source, tmp_path / "portable", target, Options("fp32")).package
    with pytest.raises(UsageError, match="cannot draft: a cache of the target portable"):
        open_with(package_fp32, portable)
    with pytest.raises(UsageError, match="cannot verify drafts: a cache of the target portable"):
        open_with(portable, package_fp32)


def test_a_graph_that_is_cut_off_is_refused(
    package_fp32: Path, smaller: Path, tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(smaller, tmp_path / "cut"))
    content = (cut / "model.onnx").read_bytes()
    (cut / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(PackageError, match=r"cut/model\.onnx"):
        open_with(package_fp32, cut)


def test_damaged_weights_cost_time_and_change_no_answer(
    package_fp32: Path, smaller: Path, tmp_path: Path
) -> None:
    """The logits of the draft are not numbers."""
    damaged = Path(shutil.copytree(smaller, tmp_path / "damaged"))
    data = damaged / "model.onnx.data"
    data.write_bytes(b"\xff" * data.stat().st_size)
    with open_with(package_fp32, damaged) as opened:
        answers(opened)
