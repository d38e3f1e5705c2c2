"""Describes the location of an error: positions, rows, heads, channels, blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.parity.bisect.culprit import Culprit
from llama_onnx.exporter.parity.bisect.deviation import ranges
from llama_onnx.exporter.parity.bisect.values import feeds_of
from llama_onnx.exporter.parity.bisect.wrong_weights import WrongWeights
from llama_onnx.runtime.measure.situations import Program


def weights_location(wrong: WrongWeights) -> Iterator[str]:
    """Yield the number of wrong weights, their rows, columns and blocks, and the first with its
    original."""
    total = len(wrong.rows) * len(wrong.columns)
    yield f"{wrong.count:,} of {total:,} weights"
    if len(wrong.rows) > 1 and not wrong.rows.all():
        yield f"rows {ranges(np.flatnonzero(wrong.rows).tolist())} of {len(wrong.rows)}"
    if not wrong.columns.all():
        columns = np.flatnonzero(wrong.columns)
        text = f"columns {ranges(columns.tolist())} of {len(wrong.columns)}"
        if wrong.codes:
            blocks = sorted(set((columns // wrong.codes.block_size).tolist()))
            text += f" (block {ranges(blocks)})"
        yield text
    place = ", ".join(map(str, wrong.place))
    yield f"[{place}] is {wrong.found:.6g}, its original {wrong.original:.6g}"


def graph_location(culprit: Culprit, program: Program, config: LlamaConfig) -> Iterator[str]:
    """Yield the wrong positions, rows of a batch, and heads or channels, unless all are wrong."""
    if culprit.point.layout != "step":
        yield from _positions(culprit, program)
    batches = [how.positions for how in culprit.seen.values() if len(how.positions) > 1]
    if batches:
        rows = np.any([wrong.any(axis=1) for wrong in batches], axis=0)  # [B]
        if rows.any() and not rows.all():
            yield f"rows {ranges(np.flatnonzero(rows).tolist())} of a batch of {rows.size}"
    channels = np.logical_or.reduce([how.channels for how in culprit.seen.values()])
    if channels.any() and not channels.all():
        yield _units(culprit.point.name, channels, config)


def _positions(culprit: Culprit, program: Program) -> Iterator[str]:
    wrong, right = set[int](), set[int]()
    with_cache, without_cache = False, False
    for index, how in culprit.seen.items():
        for feed in feeds_of(program[index]):
            offsets = {"padded": feed.padding, "last": 1 - feed.count}
            offset = offsets.get(culprit.point.layout, 0)
            cached = culprit.point.layout == "cache"
            first = 0 if cached else feed.begin
            for position in range(first, feed.begin + feed.count):
                column = position - first + offset
                if 0 <= column < how.positions.shape[1]:
                    bad = bool(how.positions[feed.batch, column])
                    (wrong if bad else right).add(position)
                    with_cache |= bad and feed.begin > 0
                    without_cache |= bad and feed.begin == 0
    if wrong and right - wrong:
        yield f"positions {ranges(sorted(wrong))} of 0-{max(wrong | right)}"
    if with_cache and not without_cache:
        yield "only after a cache"


def _units(point: str, wrong: npt.NDArray[np.bool_], config: LlamaConfig) -> str:
    """Return the wrong channels, or the heads that they belong to."""
    dim = config.head_dim
    queries, keys = config.q_size // dim, config.kv_size // dim
    heads = sorted(set((np.flatnonzero(wrong) // dim).tolist()))
    if point == "self_attn.qkv_proj":
        parts = {
            "query": [h for h in heads if h < queries],
            "key": [h - queries for h in heads if queries <= h < queries + keys],
            "value": [h - queries - keys for h in heads if h >= queries + keys],
        }
        return ", ".join(f"{name} heads {ranges(found)}" for name, found in parts.items() if found)
    if point == "self_attn" or point.endswith((".key", ".value")):
        return f"heads {ranges(heads)} of {len(wrong) // dim}"
    return f"channels {ranges(np.flatnonzero(wrong).tolist())} of {len(wrong)}"
