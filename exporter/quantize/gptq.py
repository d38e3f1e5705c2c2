"""GPTQ (Frantar et al., 2022, arXiv:2210.17323): each rounding error is made up for by the columns
that are not rounded yet.

With H = E[x x^T], the error of column k changes each later column j by -error * U[k, j] / U[k, k],
where U is the upper Cholesky factor of H's inverse. Scales and zero points are chosen before
("static groups"), so columns can be taken in the order of their weight ("act-order") without
reordering the stored ones. H's off-diagonal elements are multiplied by SHRINK: from few tokens they
are uncertain, and a matrix of 11,008 channels would otherwise be fitted to noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.storage import Blocks, Quantized
from llama_onnx.exporter.quantize.base import Quantizer
from llama_onnx.exporter.quantize.inputs import Inputs
from llama_onnx.exporter.quantize.ranges import quantized, search_grid

SHRINK = 0.65
"""Factor of the off-diagonal elements of H, for 8,192 tokens; 0.6 to 0.85 are as good with eight
times as many."""

DAMPING = 0.01
"""Added to H's diagonal, relative to its mean, as in the paper."""

_COLUMNS = 64  # rounded together before the later columns are changed


@dataclass(frozen=True)
class Gptq:
    """The `CalibratedQuantizer` that rounds column by column."""

    name: str = "gptq"
    correlates: bool = True
    weighs: bool = False
    shrink: float = SHRINK
    damping: float = DAMPING

    def with_inputs(self, inputs: Inputs) -> Quantizer:
        """Return the quantizer of matrices that have these inputs; `inputs.products` is
        overwritten."""
        assert inputs.products is not None, "it correlates"
        order, factor = inverse_factor(inputs.products, self.shrink, self.damping)
        return _ColumnByColumn(self.name, inputs.squares, order, factor)


@dataclass(frozen=True)
class _ColumnByColumn:
    name: str
    squares: Float32
    order: npt.NDArray[np.int64]
    factor: Tensor

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        """Return `rows` [R, K] quantized."""
        grid = search_grid(rows, self.squares, storage)
        size, width = storage.block_size, rows.shape[1]
        scales, zeros = (np.repeat(part, size, axis=1)[:, :width] for part in grid)
        columns, steps, points = (
            torch.from_numpy(np.ascontiguousarray(part.T[self.order]))
            for part in (rows, scales, zeros)
        )
        most = (1 << storage.bits) - 1
        found = round_columns(columns, steps, points, self.factor, most)
        codes = np.repeat(grid[1].astype(np.uint8), size, axis=1)  # padding has the code of zero
        codes[:, self.order] = found.T
        return quantized(codes, grid, storage)


def inverse_factor(
    products: Float32, shrink: float, damping: float
) -> tuple[npt.NDArray[np.int64], Tensor]:
    """Return the order [K] in which to take the columns, that of falling mean squares, and the
    upper Cholesky factor [K, K] of the inverse of `products` in that order. `products` is
    overwritten."""
    diagonal = products.diagonal().copy()
    diagonal[diagonal <= 0] = 1  # a channel that is always 0
    products *= np.float32(shrink)
    np.fill_diagonal(products, diagonal + np.float32(damping * diagonal.mean()))
    order = np.argsort(-diagonal, kind="stable")
    # In the memory of `products` again and again: each of these takes half a gigabyte at 7B.
    products[:] = products[order][:, order]
    square = torch.from_numpy(products)
    lower = torch.linalg.cholesky(square)
    torch.cholesky_inverse(lower, out=square)
    del lower
    return order, torch.linalg.cholesky(square, upper=True)


def round_columns(
    columns: Tensor, scales: Tensor, zeros: Tensor, factor: Tensor, most: int
) -> npt.NDArray[np.uint8]:
    """Return the codes [K, N] of `columns` [K, N], which are changed; `scales` and `zeros` are
    [K, N], `factor` is that of `inverse_factor`, `most` the largest code."""
    count = len(columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    inverse = 1 / scales
    for start in range(0, count, _COLUMNS):
        stop = min(start + _COLUMNS, count)
        part, block = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for k in range(stop - start):
            at = start + k
            code = (part[k] * inverse[at]).add_(zeros[at]).round_().clamp_(0, most)
            codes[at] = code
            errors[k] = (part[k] - (code - zeros[at]) * scales[at]).div_(block[k, k])
            part[k + 1 :].addr_(block[k, k + 1 :], errors[k], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.numpy()
