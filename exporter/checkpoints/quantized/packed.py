"""A matrix stored as GPTQ or AWQ codes, read as dequantized rows or as codes for a package.

weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], where g is the group of input channel k. The
tensors are stored [inputs, outputs], so a row of the weight is a column of each tensor. All codes
of a matrix are therefore read at once and kept while its rows are read.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.checkpoints.quantized.settings import WHOLE_ROW, Quantization
from llama_onnx.exporter.formats.tensor import BlockCodes, Float32, LazyTensor, StoredTensor, widen
from llama_onnx.exporter.model.checkpoint import CodedMatrix
from llama_onnx.exporter.model.storage import BLOCK_SIZES, RowBlocks, unpack
from llama_onnx.targets.errors import CheckpointError, UnsupportedError

Words = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

_WHOLE_ROW_BLOCK = 128
"""Block size if one scale covers the whole row and is repeated per block: this size is fast."""

CODES, SCALES = ("I32",), ("F16", "BF16", "F32")
"""Types in which codes and scales may be stored."""


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


@dataclass(frozen=True)
class Contents:
    """The data of one matrix: codes as in the file, zero points [N, groups] and scales
    [N, groups]."""

    words: Words
    zeros: Bytes
    scales: Float32


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix [N, K] of a quantized checkpoint; `bits` is 4 or 8, `group_size` at most K."""

    parts: Parts
    layout: Layout
    quantization: Quantization
    shape: tuple[int, int]
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """The Hugging Face name it would have as floats."""
        return f"{self.parts.module}.weight"

    def tensor(self) -> LazyTensor:
        """Return it as a lazy tensor with dequantized rows."""
        contents, groups = functools.cache(self._read), functools.cache(self._groups)

        def rows(start: int, stop: int) -> Float32:
            read = contents()
            packed = self.layout.rows(read.words, start, stop, self.bits)
            values = unpack(packed, self.bits).astype(np.float32)
            # `take` is five times as fast as indexing.
            values -= np.take(read.zeros[start:stop], groups(), axis=1)
            values *= np.take(read.scales[start:stop], groups(), axis=1)
            return values

        dtype = f"INT{self.bits}/{self.group_size}"
        codes = BlockCodes(self.bits, self.group_size)
        return LazyTensor(self.name, self.shape, dtype, self.parts.nbytes, rows, codes)

    def coded(self) -> CodedMatrix:
        """Return its codes, scales and zero points as blocks of a package; raises
        `UnsupportedError` if its groups do not fit a block size."""
        columns, order = self.shape[1], self._order()
        label = "" if order is None else hashlib.sha256(order.tobytes()).hexdigest()[:16]
        storage = RowBlocks(self.bits, self._block_size(), zero_points=True, order=label)
        starts = np.arange(storage.num_blocks(columns)) * storage.block_size
        group = starts // self.group_size  # [blocks]: a group may span several blocks
        contents = functools.cache(self._read)

        def blocks(start: int, stop: int) -> tuple[npt.NDArray[Any], ...]:
            read = contents()
            packed = self.layout.rows(read.words, start, stop, self.bits)
            if order is not None:
                packed = pack(np.take(unpack(packed, self.bits), order, axis=1), self.bits)
            missing = len(starts) * storage.block_bytes - packed.shape[1]  # of a partial block
            codes = np.pad(packed, ((0, 0), (0, missing))) if missing else packed
            codes = codes.reshape(stop - start, len(starts), storage.block_bytes)
            zeros = pack(read.zeros[start:stop, group], self.bits)
            return codes, read.scales[start:stop, group], zeros

        return CodedMatrix(self.name, self.shape, storage, order, blocks)

    def _block_size(self) -> int:
        if self.group_size == self.shape[1]:
            return _WHOLE_ROW_BLOCK
        fitting = [size for size in BLOCK_SIZES if self.group_size % size == 0]
        if not fitting:
            raise UnsupportedError(
                f"{self.parts.path}: {self.name} has groups of {self.group_size}, which is not a "
                f"multiple of {BLOCK_SIZES[0]}: pass --precision fp16 or fp32, which dequantize."
            )
        return max(fitting)

    def _read(self) -> Contents:
        self._check_bias()
        if self._order() is None:
            self._check_contiguous()
        zeros = self.layout.zeros(self.parts, self.quantization, self.bits)
        return Contents(
            self.parts.qweight.read().view(np.uint32),
            np.ascontiguousarray(zeros[:, : self.shape[0]].T),
            np.ascontiguousarray(widen(self.parts.scales.read()).T),
        )

    def _check_bias(self) -> None:
        if self.parts.bias is not None and widen(self.parts.bias.read()).any():
            raise UnsupportedError(
                f"{self.parts.path} has the tensor {self.parts.bias.name}, which is not zero; a "
                "plain Llama has none, and exporting without it would change the model."
            )

    def _check_contiguous(self) -> None:
        if not np.array_equal(self._groups(), self._contiguous_groups()):
            raise CheckpointError(
                f"{self.parts.path}: {self.parts.module}.g_idx reorders the input channels, but "
                f"{self.quantization.where} does not set desc_act: set it to true there."
            )

    def _contiguous_groups(self) -> Integers:
        return np.arange(self.shape[1]) // self.group_size

    def _groups(self) -> Integers:
        """Return the group of each input channel, [K]; raises `CheckpointError` unless all groups
        are full."""
        contiguous = self._contiguous_groups()
        if self.parts.g_idx is None:
            return contiguous
        groups = self.parts.g_idx.read().astype(np.int64)
        if not groups.any():  # GPTQ's kernels treat all zeros as no reordering
            return contiguous
        if not np.array_equal(np.sort(groups), contiguous):
            raise CheckpointError(
                f"{self.parts.path}: {self.parts.module}.g_idx does not put {self.group_size} "
                f"input channels into each group: group_size in {self.quantization.where} is "
                "wrong, or the file is damaged."
            )
        return groups

    def _order(self) -> Integers | None:
        """Return the order of input channels that makes groups contiguous; None if they already
        are.

        Reads nothing unless the configuration allows groups that are not contiguous.
        """
        if not (self.quantization.act_order or self.quantization.mixed):
            return None
        order = np.argsort(self._groups(), kind="stable")
        return None if np.array_equal(order, np.arange(len(order))) else order


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
    groups = parts.scales.shape[0]
    size = _group_size(quantization, inputs, groups)
    if size is None:
        raise CheckpointError(
            f"{where}.scales has {groups} groups for {inputs} input channels, but group_size in "
            f"{quantization.where} is {quantization.group_size}."
        )
    check_tensor(parts.scales, (groups, outputs), SCALES)
    check_tensor(parts.qzeros, (groups, -(-outputs * int(bits) // 32)), CODES)
    if parts.g_idx is not None:
        check_tensor(parts.g_idx, (inputs,), ("I32", "I64"))
    if parts.bias is not None:
        check_tensor(parts.bias, (outputs,), SCALES)
    return PackedMatrix(parts, layout, quantization, shape, int(bits), size)


def check_tensor(found: StoredTensor, shape: tuple[int | None, ...], codes: Sequence[str]) -> None:
    """Raise `CheckpointError` unless `found` has one of the types `codes` and the shape `shape`, in
    which None allows any size but zero."""
    fits = len(found.shape) == len(shape) and all(
        there == wanted if wanted is not None else there > 0
        for there, wanted in zip(found.shape, shape, strict=True)
    )
    if not fits or found.code not in codes:
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise CheckpointError(
            f"{found.path}: {found.name} is {found.code} {list(found.shape)} instead of "
            f"{' or '.join(codes)} {wanted}: the tensors of its module do not match."
        )


def _group_size(quantization: Quantization, inputs: int, groups: int) -> int | None:
    size = inputs if quantization.group_size == WHOLE_ROW else min(quantization.group_size, inputs)
    if -(-inputs // size) == groups:
        return size
    if quantization.mixed and inputs % groups == 0:
        return inputs // groups
    return None


def pack(codes: Bytes, bits: int) -> Bytes:
    """Return codes [R, n] packed into bytes [R, ceil(n bits / 8)], the first in the low bits."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, 0::2] | even[:, 1::2] << np.uint8(4)
