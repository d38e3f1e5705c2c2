"""AWQ's GEMM layout (Lin et al., 2023), as AutoAWQ writes it, with 4 bits.

For a linear layer of K inputs and N outputs in G groups:

    qweight [K, N / 8]   eight outputs of input k in one int32
    qzeros  [G, N / 8]   the zero points of eight outputs in one int32, unchanged
    scales  [G, N]

Nibble p of word j, low bits first, belongs to output 8 j + `ORDER[p]`: adjacent outputs are 16 bits
apart, as AWQ's GPU kernel needs them.
"""

from __future__ import annotations

import numpy as np

from llama_onnx.exporter.checkpoints.quantized.packed import (
    CODES,
    SCALES,
    Bytes,
    PackedMatrix,
    Words,
    check_tensor,
)
from llama_onnx.exporter.checkpoints.quantized.settings import Quantization
from llama_onnx.exporter.checkpoints.quantized.transposed import Layout, Parts, open_matrix

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def open_awq(parts: Parts, quantization: Quantization) -> PackedMatrix:
    """Return the matrix of the tensors `parts`; raises `CheckpointError` if they do not match."""
    check_tensor(parts.qweight, (None, None), CODES)
    check_tensor(parts.scales, (None, None), SCALES)
    inputs, words = parts.qweight.shape
    outputs = parts.scales.shape[1]
    layout = Layout(weight_rows, zero_points)
    return open_matrix(parts, layout, quantization, (outputs, inputs), 32 * words / outputs)


def weight_rows(words: Words, start: int, stop: int, bits: int) -> Bytes:
    """Return rows [start, stop) of the weight, packed along the input."""
    first, last = start // 8, -(-stop // 8)
    codes = _outputs(words[:, first:last])  # [rows, K]
    packed = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    return packed[start - 8 * first : stop - 8 * first]


def zero_points(parts: Parts, quantization: Quantization, bits: int) -> Bytes:
    """Return the zero points [G, N]."""
    return _outputs(parts.qzeros.read().view(np.uint32)).T


def _outputs(words: Words) -> Bytes:
    """Return words [m, n] as codes [8 n, m], one row per output."""
    across = np.ascontiguousarray(words.T, dtype="<u4")  # [n, m]
    pairs = across.view(np.uint8).reshape(*across.shape, 4)  # two nibbles per byte, low first
    codes = np.empty((words.shape[1], 8, words.shape[0]), np.uint8)
    for place, output in enumerate(ORDER):
        codes[:, output] = pairs[..., place // 2] >> np.uint8(4 * (place % 2)) & 15
    return codes.reshape(-1, words.shape[0])
