"""AWQ: activation-aware weight quantization (Lin et al., 2023, arXiv:2306.00978).

Channels with large inputs are multiplied by a scale before rounding, and their inputs divided by it
(see `model.channel_scales`). The paper searches the exponent of s = mean|x|^alpha by the loss of
each group of matrices; here s = sqrt(mean x^2)^ALPHA with one exponent for all, which lost no more
on the model measured, and the search goes into each block's range instead (see `search`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.channel_scales import Exponents, exponents_of
from llama_onnx.exporter.model.storage import Blocks, Quantized
from llama_onnx.exporter.quantize.base import Quantizer
from llama_onnx.exporter.quantize.inputs import Inputs
from llama_onnx.exporter.quantize.search import nearest_codes, quantized, search_grid

ALPHA = 0.6
"""Exponent of a channel's root mean square."""

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


def channel_exponents(squares: Float32, alpha: float = ALPHA) -> Exponents:
    """Return the exponents of AWQ's scales for channels of mean squares `squares` [K]: centered, so
    that the largest scale is as far above 1 as the smallest is below."""
    scales = np.maximum(np.sqrt(squares), _LEAST) ** np.float32(alpha)
    return exponents_of(scales / np.sqrt(scales.max() * scales.min()))
