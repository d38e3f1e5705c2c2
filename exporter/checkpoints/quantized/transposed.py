"""What GPTQ's and AWQ's layouts share: tensors stored [inputs, outputs].

A row of the weight is a column of each tensor. All codes of a matrix are therefore read at once and
kept while its rows are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llama_onnx.exporter.checkpoints.quantized.packed import (
    CODES,
    SCALES,
    Bytes,
    Contents,
    Groups,
    PackedMatrix,
    Words,
    check_tensor,
)
from llama_onnx.exporter.checkpoints.quantized.settings import WHOLE_ROW, Quantization
from llama_onnx.exporter.formats.tensor import StoredTensor, widen
from llama_onnx.targets.errors import CheckpointError, UnsupportedError


@dataclass(frozen=True)
class Parts:
    """The tensors of one quantized module, not read yet."""

    module: str
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None
    bias: StoredTensor | None

    @property
    def path(self) -> Path:
        """The file of the codes, for messages."""
        return self.qweight.path

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        parts = (self.qweight, self.qzeros, self.scales, self.g_idx, self.bias)
        return sum(part.nbytes for part in parts if part)


@dataclass(frozen=True)
class Layout:
    """How a format arranges its codes.

    `rows(words, start, stop, bits)` returns rows of the weight [R, bytes], packed along the input,
    low bits first. `zeros(parts, quantization, bits)` reads the zero points [groups, N], with up to
    a word of padding at the end of each row.
    """

    rows: Callable[[Words, int, int, int], Bytes]
    zeros: Callable[[Parts, Quantization, int], Bytes]


def open_matrix(
    parts: Parts,
    layout: Layout,
    quantization: Quantization,
    shape: tuple[int, int],
    bits: float,
) -> PackedMatrix:
    """Return the matrix of `shape` made of the tensors `parts`; `bits` per code follows from the
    shape of the codes.

    Raises `CheckpointError` if shapes or types contradict one another or the configuration.
    """
    outputs, inputs = shape
    where = f"{parts.path}: {parts.module}"
    allowed = (4, 8) if quantization.mixed else (quantization.bits,)
    if bits not in allowed:
        known = " or ".join(map(str, allowed))
        raise CheckpointError(
            f"{where}.qweight has {bits:g} bits per weight, not {known}: {quantization.where} "
            "belongs to another model, or the file is damaged."
        )
    count = parts.scales.shape[0]
    size = _group_size(quantization, inputs, count)
    if size is None:
        raise CheckpointError(
            f"{where}.scales has {count} groups for {inputs} input channels, but group_size in "
            f"{quantization.where} is {quantization.group_size}."
        )
    check_tensor(parts.scales, (count, outputs), SCALES)
    check_tensor(parts.qzeros, (count, -(-outputs * int(bits) // 32)), CODES)
    if parts.g_idx is not None:
        check_tensor(parts.g_idx, (inputs,), ("I32", "I64"))
    if parts.bias is not None:
        check_tensor(parts.bias, (outputs,), SCALES)
    may_reorder = quantization.act_order or quantization.mixed
    return PackedMatrix(
        f"{parts.module}.weight",
        parts.path,
        parts.nbytes,
        shape,
        int(bits),
        Groups(inputs, size, parts.g_idx, quantization.where, may_reorder),
        symmetric=False,
        read=partial(_read, parts, layout, quantization, int(bits), outputs),
    )


def _read(
    parts: Parts, layout: Layout, quantization: Quantization, bits: int, outputs: int
) -> Contents:
    if parts.bias is not None and widen(parts.bias.read()).any():
        raise UnsupportedError(
            f"{parts.path} has the tensor {parts.bias.name}, which is not zero; a plain Llama has "
            "none, and exporting without it would change the model."
        )
    words = parts.qweight.read().view(np.uint32)
    return Contents(
        lambda start, stop: layout.rows(words, start, stop, bits),
        np.ascontiguousarray(layout.zeros(parts, quantization, bits)[:, :outputs].T),
        np.ascontiguousarray(widen(parts.scales.read()).T),
    )


def _group_size(quantization: Quantization, inputs: int, groups: int) -> int | None:
    size = inputs if quantization.group_size == WHOLE_ROW else min(quantization.group_size, inputs)
    if -(-inputs // size) == groups:
        return size
    if quantization.mixed and inputs % groups == 0:
        return inputs // groups
    return None
