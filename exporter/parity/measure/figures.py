"""Figures computed from the evidence: errors by situation, curves, greedy continuations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.parity.measure.evidence import Evidence
from llama_onnx.exporter.parity.measure.loss import observed_pairs
from llama_onnx.exporter.parity.measure.report import Curve, Greedy, Measurement
from llama_onnx.runtime.measure.certificate import next_tokens
from llama_onnx.runtime.measure.metrics import (
    NO_TARGET,
    Ids,
    compare,
    figures_in_pieces,
    first_divergence,
    summarize,
)
from llama_onnx.runtime.measure.situations import Passage


def measurements(evidence: Evidence) -> Iterator[Measurement]:
    """Yield the errors of graph and package in each situation, then the quantization's."""
    passages = evidence.shipped.passages
    for name, figures in evidence.graph.items():
        yield Measurement("graph", name, summarize(figures))
    for name, observations in evidence.shipped.observations.items():
        for error, reference in (
            ("shipped", evidence.package_logits),
            ("total", evidence.original_logits),
        ):
            pairs = observed_pairs(passages, reference, observations)
            yield Measurement(error, name, compare(pairs))
    targets = [next_tokens(passage) for passage in passages]
    pairs = zip(evidence.original_logits, evidence.package_logits, targets, strict=True)
    yield Measurement("quantization", "", compare(pairs))


def curves(evidence: Evidence) -> Iterator[Curve]:
    """Yield each passage's errors against the original weights, position by position."""
    observed = evidence.shipped.observations["prefill"]
    sides = {
        "quantization": list(enumerate(evidence.package_logits)),
        "total": [(found.passage, found.logits) for found in observed],
    }
    for error, candidates in sides.items():
        for index, logits in candidates:
            reference = evidence.original_logits[index][-len(logits) :]
            targets = np.full(len(logits), NO_TARGET)
            figures = list(figures_in_pieces(reference, logits, targets))
            distance = [np.sqrt(f.squares / f.reference_squares) for f in figures]
            kl = np.concatenate([f.kl for f in figures])
            yield Curve(error, index, tuple(np.concatenate(distance).tolist()), tuple(kl.tolist()))


def greedy_continuations(evidence: Evidence) -> tuple[Greedy, Greedy]:
    """Return those of the graph with fp32 activations, then those of the package as it ships."""
    passages = evidence.shipped.passages
    chosen = [
        choices[p.prompt - 1 : -1]
        for p, choices in zip(passages, evidence.graph_choices, strict=True)
    ]
    written = [p.ids[p.prompt :] for p in passages]
    return (
        _teacher_forced("graph", passages, chosen, evidence.package_logits),
        _teacher_forced("shipped", passages, written, evidence.original_logits),
    )


def _teacher_forced(
    name: str, passages: Sequence[Passage], tokens: list[Ids], reference: list[Float32]
) -> Greedy:
    divergences, agreeing = [], []
    for passage, chosen, logits in zip(passages, tokens, reference, strict=True):
        rows = logits[passage.prompt - 1 : -1]  # [n, V]: where the n tokens were chosen
        divergences.append(first_divergence(rows, chosen.tolist()))
        agreeing.append(rows.argmax(axis=-1) == chosen)  # [n]
    return Greedy(name, len(tokens[0]), float(np.mean(agreeing)), tuple(divergences))
