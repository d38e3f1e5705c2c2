"""AWQ: activation-aware weight quantization (Lin et al., 2023, arXiv:2306.00978).

Channels with large inputs are multiplied by a scale before rounding, and their inputs divided by it
(see `model.channel_scales`), so that they lose less. As in the authors' later code ("duo scaling"),
a scale is s = x^alpha / w^(1 - alpha). x is the root mean square of the channel's inputs, w the
mean of its weights' magnitudes, each relative to the largest of its block: small weights beside
large ones are lifted as well. Each group of matrices has the alpha that loses least of a few,
measured on some of its rows; the range of each block is then searched (see `ranges`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.channel_scales import Exponents, exponents_of, scales_of
from llama_onnx.exporter.model.storage import Blocks, Quantized
from llama_onnx.exporter.quantize.base import Quantizer
from llama_onnx.exporter.quantize.inputs import Inputs
from llama_onnx.exporter.quantize.ranges import (
    blocks_first,
    dequantized,
    nearest_codes,
    quantized,
    search_grid,
)

ALPHAS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Exponents to try: 0 looks at the weights alone."""

SAMPLE = 256
"""Rows of a group's matrices that decide."""

_LEAST = np.float32(1e-5)
"""Root mean square of a channel that is never used."""


@dataclass(frozen=True)
class ActivationAware:
    """The `CalibratedQuantizer`: each input channel counts by its mean square."""

    name: str = "awq"
    correlates: bool = False

    def with_inputs(self, inputs: Inputs) -> Quantizer:
        """Return the quantizer of matrices that have these inputs."""
        return _Weighted(self.name, inputs.squares)


@dataclass(frozen=True)
class _Weighted:
    name: str
    squares: Float32

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        """Return `rows` [R, K] on the grid that loses least, each weight rounded to nearest."""
        grid = search_grid(rows, self.squares, storage)
        return quantized(nearest_codes(rows, grid, storage), grid, storage)


def channel_exponents(
    rows: Float32, squares: Float32, storage: Blocks, shared: int, groups: int = 1
) -> Exponents:
    """Return the exponents of the channels' scales for matrices of which `rows` [R, K] are some
    rows, with inputs of mean squares `squares` [K].

    Each of `groups` runs of columns holds `shared` runs of channels that share their scales: the
    query heads of one key-value head. The result has K / `shared` exponents; without sharing,
    `shared` and `groups` are 1.
    """
    magnitudes = _magnitudes(rows, storage)
    channels = (groups, shared, rows.shape[1] // groups // shared)
    x = np.sqrt(np.maximum(squares, _LEAST**2).reshape(channels).mean(axis=1))
    w = np.maximum(magnitudes.reshape(channels).mean(axis=1), _LEAST)
    best, found = np.inf, np.zeros(x.size, np.int8)
    for alpha in ALPHAS:
        scales = x ** np.float32(alpha) / w ** np.float32(1 - alpha)
        exponents = exponents_of(scales / np.sqrt(scales.max() * scales.min()))
        columns = np.broadcast_to(exponents[:, None], channels).reshape(-1)
        loss = _loss(rows, squares, scales_of(columns), storage)
        if loss < best:
            best, found = loss, exponents.reshape(-1)
    return found


def _magnitudes(rows: Float32, storage: Blocks) -> Float32:
    """Return the mean magnitude of each column of `rows` [R, K], relative to the largest of each
    block."""
    blocks = np.abs(blocks_first(rows, storage))  # [block_size, R, blocks]
    relative = blocks / np.maximum(blocks.max(axis=0), np.float32(1e-30))
    means: Float32 = relative.mean(axis=1).T.reshape(-1)[: rows.shape[1]]
    return means


def _loss(rows: Float32, squares: Float32, scales: Float32, storage: Blocks) -> float:
    """Return the mean square error of the output if columns are multiplied by `scales` [K]."""
    scaled, weights = rows * scales, squares / scales**2
    grid = search_grid(scaled, weights, storage)
    error = dequantized(nearest_codes(scaled, grid, storage), grid, rows.shape[1]) - scaled
    return float(np.einsum("rk,rk,k->", error, error, weights, dtype=np.float64))
