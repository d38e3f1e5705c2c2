"""What is lost on the evaluation text, computed from the logits of the three models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.runtime.measure.certificate import next_tokens
from llama_onnx.runtime.measure.metrics import Comparison, Ids, compare, nats_of_next
from llama_onnx.runtime.measure.situations import Observation, Passage


@dataclass(frozen=True)
class Lost:
    """The package's weights in PyTorch, and the package as it ships, against the original.

    `original_perplexity` is that of the original on the same text.
    """

    original_perplexity: float
    weights: Comparison
    shipped: Comparison


def measure_loss(
    passages: Sequence[Passage],
    original: Sequence[Float32],
    package: Sequence[Float32],
    shipped: Iterable[Observation],
) -> Lost:
    """Compare the logits [N, V] of each passage by the `package`'s weights, and those that it
    `shipped`, with the `original`'s."""
    targets = [next_tokens(passage) for passage in passages]
    nats = [nats_of_next(logits, t) for logits, t in zip(original, targets, strict=True)]
    return Lost(
        float(np.exp(np.concatenate(nats).mean())),
        compare(zip(original, package, targets, strict=True)),
        compare(observed_pairs(passages, original, shipped)),
    )


def observed_pairs(
    passages: Sequence[Passage], reference: Sequence[Float32], observations: Iterable[Observation]
) -> Iterator[tuple[Float32, Float32, Ids]]:
    """Yield the reference's logits, those observed, and the next tokens, for `compare`."""
    for found in observations:
        targets = next_tokens(passages[found.passage])[found.positions]
        yield reference[found.passage][found.positions], found.logits, targets
