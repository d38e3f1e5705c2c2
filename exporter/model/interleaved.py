"""Query and key rows interleaved for the rotary embedding, as in Meta's and GGUF's files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32


def half_split_rows(
    rows: Callable[[int, int], Float32], head_dim: int, start: int, stop: int
) -> Float32:
    """Return rows [start, stop) in Hugging Face's order, which pairs rows half a head apart.

    `rows(start, stop)` returns interleaved rows [stop - start, K], where pairs are adjacent. Whole
    heads are read and reordered; the result is then cut to the rows asked for.
    """
    first, last = start // head_dim, -(-stop // head_dim)
    stored = rows(first * head_dim, last * head_dim)
    width = stored.shape[1]
    pairs = stored.reshape(last - first, head_dim // 2, 2, width)
    halves = pairs.swapaxes(1, 2).reshape(stored.shape)
    return np.ascontiguousarray(halves[start - first * head_dim : stop - first * head_dim])
