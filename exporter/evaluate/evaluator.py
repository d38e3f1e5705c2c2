"""A package and its original, both open, which measures shards of a corpus."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_onnx.exporter.evaluate.totals import Passage, Totals
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.trial import WITHOUT_KERNELS
from llama_onnx.exporter.parity.measure.evaluation import LENGTH, pieces
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.prompts import encode
from llama_onnx.exporter.reference.walk import Ids, read_out, walk_to_head
from llama_onnx.runtime.measure.graph_session import GraphSession, GrowingCache
from llama_onnx.runtime.measure.metrics import (
    NO_TARGET,
    Logits,
    figures_in_pieces,
    nats_of_next,
)
from llama_onnx.targets.errors import PackageError, UsageError

_LOGIT_BYTES = 256 << 20
"""Of the reference's logits at a time, or those of one passage if they take more."""


@dataclass(frozen=True)
class Pair:
    """A passage [N] with the logits [N, V] of the original and of the package."""

    ids: Ids
    original: Logits
    package: Logits


class Evaluator:
    """Measures texts in passages of at most `length` tokens."""

    def __init__(self, package: Path, original: Checkpoint, length: int = LENGTH) -> None:
        """Open both; raises what `open_subject` raises, and `UsageError` for a package without a
        tokenizer or CPU kernels."""
        subject = open_subject(package, original)
        if subject.weights.activations in WITHOUT_KERNELS:
            raise UsageError(
                f"{package} has {subject.weights.activations} activations, for which ONNX Runtime "
                "has no CPU kernels: evaluate an export with fp16 activations."
            )
        if not (package / "tokenizer.json").exists():
            raise UsageError(f"{package} has no tokenizer: a corpus is a text.")
        self._package, self._original = package, subject.original
        self._config = subject.original.config
        self.length = min(length, self._config.max_position_embeddings)
        self._graph = GraphSession.open(package)

    def measure(self, text: str) -> Totals:
        """Return the totals of a text; of one that is too short to predict anything, none."""
        return Totals.of(measure_passage(pair) for pair in self.pairs(text))

    def pairs(self, text: str) -> Iterator[Pair]:
        """Yield each passage with both models' logits."""
        passages = self._passages(text)
        if not passages:
            return
        hidden = walk_to_head(self._original, passages)
        group = max(1, _LOGIT_BYTES // (4 * self._config.vocab_size * self.length))
        for start in range(0, len(passages), group):
            some = slice(start, start + group)
            for ids, logits in zip(
                passages[some], read_out(self._original, hidden[some]), strict=True
            ):
                yield Pair(ids, logits, self._shipped(ids))

    def _passages(self, text: str) -> Sequence[Ids]:
        if not text.strip():
            return []
        (ids,) = encode(self._package, [text])
        if ids.max() >= self._config.vocab_size:
            raise PackageError(
                f"{self._package}: the tokenizer gives ids beyond the vocabulary of "
                f"{self._config.vocab_size}."
            )
        cut = pieces(ids, self._config, self.length, len(ids))
        return [piece for piece in cut if len(piece) >= 2]

    def _shipped(self, ids: Ids) -> Logits:
        """Return the package's logits [N, V]: from a graph with those of the last position only,
        token by token."""
        logits, _ = self._graph.step(ids)
        if len(logits) == len(ids):
            return logits
        cache = GrowingCache(self._graph)
        return np.concatenate([cache.step(ids[i : i + 1]) for i in range(len(ids))])


def measure_passage(pair: Pair) -> Passage:
    """Return the sums of a passage; raise `PackageError` for logits that are not numbers."""
    targets = np.append(pair.ids[1:], NO_TARGET)
    figures = list(figures_in_pieces(pair.original, pair.package, targets))
    kl = np.concatenate([part.kl for part in figures])
    top1 = np.concatenate([part.top1 for part in figures])
    original, package = (nats_of_next(side, targets) for side in (pair.original, pair.package))
    sums = {
        "kl": math.fsum(kl),
        "same_top1": math.fsum(top1),
        "original_nats": math.fsum(original),
        "package_nats": math.fsum(package),
        "surprise": math.fsum(package - original),
    }
    if not all(map(math.isfinite, sums.values())):
        raise PackageError(
            "the package or its original computes logits that are not numbers: "
            "`llama-onnx validate` finds where."
        )
    return Passage(len(targets), len(original), sums, float(kl.max()))
