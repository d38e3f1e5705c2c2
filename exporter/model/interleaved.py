"""Queries and keys whose rotary embedding turns neighbouring rows, as Meta's and GGUF's do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32


def half_split_rows(
    rows: Callable[[int, int], Float32], head_dim: int, start: int, stop: int
) -> Float32:
    """Return rows [start, stop) in Hugging Face's order, where a row's partner is half a head away.

    `rows` reads them interleaved, partner beside partner. Whole heads are read, reordered, cut.
    """
    first, last = start // head_dim, -(-stop // head_dim)
    stored = rows(first * head_dim, last * head_dim)
    width = stored.shape[1]
    pairs = stored.reshape(last - first, head_dim // 2, 2, width)
    halves = pairs.swapaxes(1, 2).reshape(stored.shape)
    return np.ascontiguousarray(halves[start - first * head_dim : stop - first * head_dim])
