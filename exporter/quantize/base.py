"""The interface of a quantizer."""

from __future__ import annotations

from typing import Protocol

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.storage import Blocks, Quantized


class Quantizer(Protocol):
    """Chooses codes, scales and zero points for a matrix.

    `quantize` may be called from several threads, each with different rows of one matrix. Its
    result depends only on those rows: round-to-nearest, AWQ and GPTQ all quantize the rows of a
    weight independently. A quantizer that calibrates keeps statistics of the matrix's inputs, so
    each matrix needs its own object.
    """

    @property
    def name(self) -> str:
        """Its name in `--quantizer` and in the manifest."""
        ...

    @property
    def calibrates(self) -> bool:
        """Whether it needs activations of the model before it can quantize."""
        ...

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        """Return `rows` [R, K] of a matrix quantized for `storage`.

        A NaN or infinity in `rows`, or a scale too large for its type, gives a non-finite scale:
        the caller checks the scales.
        """
        ...
