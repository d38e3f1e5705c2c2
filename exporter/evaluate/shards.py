"""Measure the shards of a corpus, here or on a cluster, and add them up.

Finished shards go to a journal, so that a run that ended early goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_onnx.exporter.evaluate.corpus import Corpus, open_corpus
from llama_onnx.exporter.evaluate.evaluator import Evaluator
from llama_onnx.exporter.evaluate.totals import Totals
from llama_onnx.exporter.parity.measure.evaluation import LENGTH
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.batch.line_journal import Journal, open_journal
from llama_onnx.runtime.measure.evaluated import Evaluated
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.progress import SILENT, Progress

JOURNAL_SUFFIX = "-evaluation.journal"

Measured = tuple[int, bytes]


@dataclass(frozen=True)
class Work:
    """What to measure: the folder of a package, its original, and a text, in passages of `length`
    tokens."""

    package: Path
    reference: Path
    text: Path
    length: int = LENGTH

    def open(self) -> Evaluator:
        """Open both models; raises what `Evaluator` raises."""
        return Evaluator(self.package, open_checkpoint(self.reference), self.length)

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """Return what must be the same when the work goes on."""
        package = ModelPackage.open(self.package)
        return {
            "work": "evaluate",
            "package": hash_file(package.index),
            "reference": open_checkpoint(self.reference).fingerprint(),
            "text": corpus.sha256,
            "length": self.length,
            "version": version("llama-onnx"),
        }


Measure = Callable[[Work, Corpus, bytearray], Iterator[Measured]]
"""Yields the number of each shard that is not done, and its totals as JSON."""


def evaluate(
    work: Work,
    journal: Path,
    *,
    measure: Measure | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Evaluated:
    """Return how far the package is from its original over the text.

    `journal` is removed at the end. Raises `UsageError` for texts and options that make no sense,
    and what `Evaluator` raises.
    """
    if work.length < 2:
        raise UsageError(f"length must be a whole number of at least 2, not {work.length}.")
    progress.step(f"reading {work.text.name}")
    corpus = open_corpus(work.text)
    count = len(corpus.shards)
    with open_journal(journal, work.identity(corpus), count, force=force) as finished:
        progress.update("evaluating", finished.finished, count)
        if finished.finished < count:
            for number, content in (measure or measure_here)(work, corpus, finished.done):
                finished.add(number, content)
                progress.update("evaluating", finished.finished, count)
        totals = _sum(finished)
        finished.over = True
    if not totals.positions:
        raise UsageError(f"{work.text} has no passage of two tokens: give a longer text.")
    return Evaluated(work.text.name, corpus.sha256, work.length, totals.figures())


def measure_here(work: Work, corpus: Corpus, done: bytearray) -> Iterator[Measured]:
    """Measure the shards one after the other in this process."""
    evaluator = work.open()
    for number, shard in enumerate(corpus.shards):
        if not done[number]:
            yield number, to_content(evaluator.measure(shard.read(corpus.path)))


def to_content(totals: Totals) -> bytes:
    """Return totals as a line of a journal."""
    return json.dumps(totals.to_json()).encode()


def _sum(journal: Journal) -> Totals:
    totals = Totals()
    for content in journal.contents():
        totals = totals.plus(Totals.from_json(json.loads(content)))
    return totals


def describe(found: Evaluated) -> Sequence[str]:
    """Return the figures as lines."""
    figures = found.figures
    return (
        f"{figures.positions:,} positions in {figures.passages:,} passages of up to "
        f"{found.length} tokens; 95 % confidence intervals, normal over passages.",
        f"mean KL          {figures.mean_kl.text('.4g')} nats, at most {figures.max_kl:.3g}",
        f"same top-1       {figures.same_top1.text('.3%')}",
        f"perplexity       {figures.perplexity.text('.4f')}",
        f"  original       {figures.original_perplexity.text('.4f')}",
        f"  ratio          {figures.perplexity_ratio.text('.5f')}",
    )
