"""Run tasks with lm-eval's own harness, over a package and its original. Only `evaluate --tasks`
imports this module: it needs the extra `tasks`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import lm_eval.api.task
import lm_eval.utils
from datasets import Dataset
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from llama_onnx.exporter.evaluate.tasks.rating import Pair, Rating
from llama_onnx.exporter.evaluate.tasks.task_files import TaskFile
from llama_onnx.exporter.evaluate.tasks.templates import render
from llama_onnx.runtime.tokenizer.encoder import Encoder
from llama_onnx.targets.errors import LlamaOnnxError, UsageError
from llama_onnx.targets.progress import Progress

_BOOTSTRAPS = 1000
"""Draws for the standard errors that have no formula."""

_SEED = 1234
"""Of the choice of examples, as lm-eval's command has it."""

_ANSWER_TOKENS = 256
"""The most tokens of an answer where the task does not say, as in lm-eval."""

Rate = Callable[[Sequence[Pair]], Iterator[tuple[int, Rating]]]
Write = Callable[[list[int], Mapping[str, Any]], str]


@dataclass(frozen=True)
class Subject:
    """What is scored: `rate` rates continuations, `write` answers a prompt of token ids.

    `prefix` is the token before a text without a context, `length` the most tokens of a context.
    """

    stage: str
    encoder: Encoder
    prefix: int
    length: int
    rate: Rate
    write: Write | None


@dataclass(frozen=True)
class Scored:
    """What lm-eval found: `metrics` by its own names, and the values of each document."""

    metrics: Mapping[str, Any]
    higher_is_better: Mapping[str, bool]
    documents: int
    values: Mapping[tuple[str, str], Sequence[Any]]


class SubjectModel(TemplateLM):  # type: ignore[misc, unused-ignore]
    """A subject as a model of lm-eval, with the tokens that its HFLM would take."""

    def __init__(self, subject: Subject, progress: Progress) -> None:
        super().__init__()
        self._subject, self._progress = subject, progress

    @property
    def eot_token_id(self) -> int:
        """The token before a text without a context."""
        return self._subject.prefix

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of a text, with a start token if the tokenizer adds one."""
        encode = self._subject.encoder.encode
        if add_special_tokens is None:
            (plain,) = encode([string], add_special_tokens=False)
            if plain[:1] == [self._subject.prefix]:
                return plain
        special = add_special_tokens is not False
        return encode([string], add_special_tokens=special)[0]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = [(0.0, True)] * len(requests)  # of a continuation without tokens
        rated = [number for number, request in enumerate(requests) if request[2]]
        pairs = [self._pair(*requests[number][1:]) for number in rated]
        for done, (number, rating) in enumerate(self._subject.rate(pairs), 1):
            found[rated[number]] = rating.logprob, rating.greedy
            self._progress.update(self._subject.stage, done, len(pairs))
        return found

    def _pair(self, context: list[int], continuation: list[int]) -> Pair:
        room = self._subject.length + 1 - len(continuation)
        if room < 1:
            raise UsageError(
                f"a continuation of {len(continuation):,} tokens does not fit the context of "
                f"{self._subject.length:,}."
            )
        return Pair(tuple(context[-room:]), tuple(continuation))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, in windows of the whole context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for pair in lm_eval.utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._subject.length,
                context_len=1,
            ):
                windows.append((None, *lm_eval.utils.make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each prompt, cut before the first stop text."""
        write, answers = self._subject.write, []
        assert write is not None
        for request in requests:
            prompt, settings = request.args
            tokens = int(settings.get("max_gen_toks", _ANSWER_TOKENS))
            room = self._subject.length - tokens
            if tokens < 1 or room < 1:
                raise UsageError(
                    f"max_gen_toks is {tokens:,}, for a context of {self._subject.length:,} tokens."
                )
            ids = self.tok_encode(prompt) or [self._subject.prefix]
            answers.append(write(ids[-room:], {**settings, "max_gen_toks": tokens}))
            self._progress.update(self._subject.stage, len(answers), len(requests))
        return answers


def score(subject: Subject, tasks: Sequence[TaskFile], progress: Progress) -> dict[str, Scored]:
    """Return the scores by task; raise `UsageError` for a task that lm-eval cannot read."""
    with _contained():
        try:
            opened = {task.name: _open(task) for task in tasks}
            model = SubjectModel(subject, progress)
            found = evaluate(model, {"tasks": opened}, bootstrap_iters=_BOOTSTRAPS)
        except (LlamaOnnxError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever lm-eval makes of a stranger's definition
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            names = ", ".join(task.name for task in tasks)
            raise UsageError(f"lm-eval cannot score {names}: {reason.rstrip('.')[:300]}.") from None
    return {name: _scored(found, name) for name in opened}


def _open(task: TaskFile) -> ConfigurableTask:
    splits = {name: Dataset.from_list(list(rows)) for name, rows in task.splits.items()}
    # A function in place of lm-eval's own loading, which can reach the hub.
    config = {**task.config, "custom_dataset": lambda **_: splits}
    config.pop("metadata", None)
    config.setdefault("num_fewshot", 0)
    opened = ConfigurableTask(config=config)
    opened.set_fewshot_seed(seed=_SEED)
    return opened


def _scored(found: Mapping[str, Any], name: str) -> Scored:
    values: dict[tuple[str, str], list[Any]] = {}
    for sample in sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
    better = found["higher_is_better"][name]
    return Scored(found["results"][name], better, found["n-samples"][name]["effective"], values)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Render templates in our sandbox, without network, progress bars, processes and advice."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    before = logging.root.manager.disable
    with (
        mock.patch.dict(os.environ, quiet),
        mock.patch.object(lm_eval.utils, "apply_template", render),
        mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items),
        mock.patch("lm_eval.api.model.tqdm", lambda items, **_: items),
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
