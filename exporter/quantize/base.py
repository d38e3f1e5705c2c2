"""The interfaces of quantizers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.storage import Blocks, Quantized
from llama_onnx.exporter.quantize.inputs import Inputs


class Quantizer(Protocol):
    """Chooses codes, scales and zero points for a matrix from its values alone.

    `quantize` may be called from several threads, each with different rows of one matrix. Its
    result depends only on those rows.
    """

    @property
    def name(self) -> str:
        """Its name in `--quantizer` and in the manifest."""
        ...

    def quantize(self, rows: Float32, storage: Blocks) -> Quantized:
        """Return `rows` [R, K] of a matrix quantized for `storage`.

        A NaN or infinity in `rows`, or a scale too large for its type, gives a non-finite scale:
        the caller checks the scales.
        """
        ...


@runtime_checkable
class CalibratedQuantizer(Protocol):
    """Chooses codes, scales and zero points for a matrix from its values and its inputs."""

    @property
    def name(self) -> str:
        """Its name in `--quantizer` and in the manifest."""
        ...

    @property
    def correlates(self) -> bool:
        """Whether it needs the products of each two input channels, [K, K], not only squares."""
        ...

    def with_inputs(self, inputs: Inputs) -> Quantizer:
        """Return the quantizer of matrices that have these inputs. May change `inputs`."""
        ...
