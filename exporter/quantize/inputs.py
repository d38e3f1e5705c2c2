"""What a calibrated quantizer knows of a matrix's inputs: sums over the calibration's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import Float32


@dataclass(frozen=True)
class Inputs:
    """Means over tokens for a matrix with K input channels: `squares` [K] of x_k^2, and `products`
    [K, K] of x_j x_k, or None if they were not collected."""

    squares: Float32
    products: Float32 | None = None

    def scaled(self, scales: Float32) -> Inputs:
        """Return the inputs divided by `scales` [K]: those of a matrix whose columns are multiplied
        by them."""
        products = self.products
        if products is not None:
            products = products / scales
            products /= scales[:, None]
        return Inputs(self.squares / scales**2, products)


class Collector:
    """Adds up the inputs of one matrix, a sequence of tokens at a time, in float64 for squares and
    float32 for products."""

    def __init__(self, channels: int, *, correlates: bool) -> None:
        self.tokens = 0
        self._squares = np.zeros(channels, np.float64)
        self._products = np.zeros((channels, channels), np.float32) if correlates else None

    def add(self, rows: Float32) -> None:
        """Add the inputs `rows` [S, K] of S tokens."""
        self.tokens += len(rows)
        self._squares += np.einsum("sk,sk->k", rows, rows, dtype=np.float64)
        if self._products is not None:
            self._products += rows.T @ rows

    @property
    def finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return bool(np.isfinite(self._squares).all())

    def inputs(self) -> Inputs:
        """Return the means; `add` must have been called. The collector is used up."""
        squares: npt.NDArray[np.float32] = (self._squares / self.tokens).astype(np.float32)
        if self._products is not None:
            self._products /= self.tokens
        return Inputs(squares, self._products)
