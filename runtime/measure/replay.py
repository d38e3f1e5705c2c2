"""Replays a certificate's passages on an open graph, and compares with what the certificate has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_onnx.runtime.measure.certificate import Certificate, next_tokens
from llama_onnx.runtime.measure.graph_session import GraphSession
from llama_onnx.runtime.measure.metrics import (
    Comparison,
    Divergence,
    Logits,
    PositionFigures,
    TopK,
    figures_in_pieces,
    margin,
    position_figures,
    summarize,
)
from llama_onnx.runtime.measure.situations import (
    Observation,
    Passage,
    Situation,
    looks_everywhere,
    try_situation,
)
from llama_onnx.targets.progress import Progress

Rows = Mapping[tuple[int, int], Logits]
"""(passage number, position) -> logits [V], of one situation."""


@dataclass(frozen=True)
class SituationFigures:
    """The package as it runs here, compared with the references.

    `shipped` is against the package's weights, `total` against the original weights, which only the
    situations in `WHOLE` have; None elsewhere.
    """

    situation: str
    meaning: str
    shipped: Comparison
    total: Comparison | None


def replay(
    certificate: Certificate,
    graph: GraphSession,
    situations: Sequence[Situation],
    progress: Progress,
) -> tuple[list[SituationFigures], dict[str, Rows]]:
    """Return the figures of each situation, and the rows of those that look at every position."""
    figures, rows = [], {}
    for index, situation in enumerate(situations):
        progress.update(situation.meaning, index, len(situations))
        found = list(try_situation(situation, graph, certificate.passages))
        figures.append(_situation_figures(certificate, situation, found))
        if looks_everywhere(situation):
            rows[situation.name] = _rows(found)
    return figures, rows


def _situation_figures(
    certificate: Certificate, situation: Situation, found: Sequence[Observation]
) -> SituationFigures:
    shipped = summarize(_figures(certificate, certificate.package, found))
    total = None
    if looks_everywhere(situation):
        total = summarize(_figures(certificate, certificate.original, found))
    return SituationFigures(situation.name, situation.meaning, shipped, total)


def _figures(
    certificate: Certificate, side: Sequence[Any], found: Sequence[Observation]
) -> Iterator[PositionFigures]:
    for entry in found:
        targets = next_tokens(certificate.passages[entry.passage])[entry.positions]
        yield from figures_in_pieces(side[entry.passage][entry.positions], entry.logits, targets)


def _rows(found: Sequence[Observation]) -> Rows:
    return {
        (entry.passage, int(position)): row
        for entry in found
        for position, row in zip(entry.positions, entry.logits, strict=True)
    }


def full_rows(certificate: Certificate, found: Rows) -> tuple[Comparison | None, float | None]:
    """Return the figures at the positions with complete rows, and the error of the mean KL there.

    The error is the mean KL with all logits minus that with only the likeliest tokens.
    """
    whole: list[PositionFigures] = []
    cut: list[PositionFigures] = []
    for rows in certificate.full:
        kept = certificate.package[rows.passage][rows.positions]
        targets = next_tokens(certificate.passages[rows.passage])[rows.positions]
        seen = [(rows.passage, int(position)) in found for position in rows.positions]
        if any(seen):
            here = np.stack([found[rows.passage, int(p)] for p in rows.positions[seen]])
            whole.append(position_figures(rows.logits[seen], here, targets[seen]))
            cut.append(position_figures(kept[seen], here, targets[seen]))
    if not whole:
        return None, None
    compared = summarize(whole)
    return compared, compared.mean_kl - summarize(cut).mean_kl


def divergences_of(certificate: Certificate, found: Rows) -> tuple[Divergence | None, ...]:
    """Return the first token of each passage that differs from the certificate's, or None."""
    return tuple(
        _first_difference(index, passage, kept, found)
        for index, (passage, kept) in enumerate(
            zip(certificate.passages, certificate.package, strict=True)
        )
    )


def _first_difference(index: int, passage: Passage, kept: TopK, found: Rows) -> Divergence | None:
    for step, written in enumerate(passage.ids[passage.prompt :].tolist()):
        position = passage.prompt - 1 + step
        row = found.get((index, position))
        if row is not None and (here := int(row.argmax())) != written:
            return Divergence(step, here, written, margin(kept[[position]], written, here))
    return None
