"""GPTQ's layout (Frantar et al., 2022), as AutoGPTQ and GPT-QModel write it.

For a linear layer of K inputs and N outputs in G groups, with c = 32 / bits codes in an int32:

    qweight [K / c, N]   code of input k and output n: bits (k % c) * bits of word [k // c, n]
    qzeros  [G, N / c]   zero point of output n in group g: bits (n % c) * bits of word [g, n // c]
    scales  [G, N]
    g_idx   [K]          group of input k: in any order with "desc_act", otherwise k // group size

The first layout (`gptq`) stores each zero point minus one, the second (`gptq_v2`) unchanged. The
first cannot hold a zero point of 0: AutoGPTQ corrupts the word that contains it; GPT-QModel
subtracts one from all fields of a word at once, which an addition reverses.
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
from llama_onnx.exporter.model.storage import unpack
from llama_onnx.targets.errors import CheckpointError

_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}
"""The value 1 in each field of a word, by bits."""


def open_gptq(parts: Parts, quantization: Quantization) -> PackedMatrix:
    """Return the matrix of the tensors `parts`; raises `CheckpointError` if they do not match."""
    check_tensor(parts.qweight, (None, None), CODES)
    check_tensor(parts.scales, (None, None), SCALES)
    words, outputs = parts.qweight.shape
    if parts.g_idx is None:
        inputs = words * 32 // quantization.bits
    else:
        check_tensor(parts.g_idx, (None,), ("I32", "I64"))
        (inputs,) = parts.g_idx.shape
    layout = Layout(weight_rows, zero_points)
    return open_matrix(parts, layout, quantization, (outputs, inputs), 32 * words / inputs)


def weight_rows(words: Words, start: int, stop: int, bits: int) -> Bytes:
    """Return rows [start, stop) of the weight, packed: the bytes of a word have that order."""
    return np.ascontiguousarray(words[:, start:stop].T, dtype="<u4").view(np.uint8)


def zero_points(parts: Parts, quantization: Quantization, bits: int) -> Bytes:
    """Return the zero points [G, N] (N rounded up to whole words); raises `CheckpointError` if they
    are ambiguous, as they can be in the first layout."""
    words = parts.qzeros.read().view(np.uint32)
    if quantization.shifted_zeros:
        if not quantization.borrows and (unpack_words(words, bits) == (1 << bits) - 1).any():
            raise CheckpointError(
                f"{parts.path}: {parts.qzeros.name} holds a zero point of 0, which the layout "
                "'gptq' cannot store and each reader interprets differently: quantize again "
                "into 'gptq_v2'."
            )
        words = words + _ONES[bits]  # modulo 2^32
    return unpack_words(words, bits)


def unpack_words(words: Words, bits: int) -> Bytes:
    """Return words [R, m] as codes [R, 32 m / bits], low bits first."""
    return unpack(np.ascontiguousarray(words, dtype="<u4").view(np.uint8), bits)
