"""What a quantizer is."""

from __future__ import annotations

from typing import Protocol

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.storage import Blocks, Quantized


class Quantizer(Protocol):
    """Chooses codes, scales and zero points for a matrix.

    `quantize` may be called from several threads, each with other rows of one matrix, and depends
    on these rows alone: rows of a weight are quantized independently by round-to-nearest, AWQ and
    GPTQ alike. A quantizer that calibrates holds what it learnt of the matrix's inputs, so it is
    another object for each matrix.
    """

    @property
    def name(self) -> str:
        """What `--quantizer` and the manifest call it."""
        ...

    @property
    def calibrates(self) -> bool:
        """Whether it needs to see activations of the model before it can quantize."""
        ...

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        """Quantize `rows` [R, K] of a matrix for `storage`.

        A NaN or infinity among them, or a scale too large for its type, makes a scale non-finite:
        the caller checks the scales.
        """
        ...
