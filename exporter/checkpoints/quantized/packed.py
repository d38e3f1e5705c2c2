"""A matrix stored as codes in a folder, read as dequantized rows or as codes for a package.

weight[n, k] = (code[n, k] - zero[n, g]) * scale[n, g], where g is the group of input channel k.
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

from llama_onnx.exporter.formats.tensor import BlockCodes, Float32, LazyTensor, StoredTensor
from llama_onnx.exporter.model.checkpoint import CodedMatrix
from llama_onnx.exporter.model.scales import ScaleForm
from llama_onnx.exporter.model.storage import BLOCK_SIZES, RowBlocks, pack, unpack
from llama_onnx.targets.errors import CheckpointError, UnsupportedError

Words = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

_WHOLE_ROW_BLOCK = 128
"""Block size if one scale covers the whole row and is repeated per block: this size is fast."""

CODES, SCALES = ("I32",), ("F16", "BF16", "F32")
"""Types in which codes and scales may be stored."""


@dataclass(frozen=True)
class Contents:
    """The data of one matrix. `rows(start, stop)` returns codes [R, bytes], packed along the input,
    low bits first; `zeros` [N, groups] are None if all are 2^(bits-1); `scales` [N, groups]."""

    rows: Callable[[int, int], Bytes]
    zeros: Bytes | None
    scales: Float32


@dataclass(frozen=True)
class Groups:
    """Which of the `columns` input channels share a scale: `size` adjacent ones, or those to which
    `g_idx` gives the same number.

    `where` is the file that states the size. With `may_reorder` False a `g_idx` has to number
    adjacent channels.
    """

    columns: int
    size: int
    g_idx: StoredTensor | None
    where: Path
    may_reorder: bool

    def of_channels(self) -> Integers:
        """Return the group of each input channel, [K]; raises `CheckpointError` unless all groups
        are full."""
        contiguous = np.arange(self.columns) // self.size
        if self.g_idx is None:
            return contiguous
        groups = self.g_idx.read().astype(np.int64)
        # Kernels treat all zeros, and -1, as no reordering.
        if not groups.any() or (groups == -1).all():
            return contiguous
        if not np.array_equal(np.sort(groups), contiguous):
            raise CheckpointError(
                f"{self.g_idx.path}: {self.g_idx.name} does not put {self.size} input channels "
                f"into each group: group_size in {self.where} is wrong, or the file is damaged."
            )
        return groups

    def order(self) -> Integers | None:
        """Return the order of input channels that makes groups contiguous; None if they already
        are. Reads nothing unless they may be reordered."""
        if not self.may_reorder or self.g_idx is None:
            return None
        order = np.argsort(self.of_channels(), kind="stable")
        return None if np.array_equal(order, np.arange(len(order))) else order

    def check_order(self) -> None:
        """Raise `CheckpointError` for channels that are reordered although they must not be."""
        if self.may_reorder or self.g_idx is None:
            return
        if not np.array_equal(self.of_channels(), np.arange(self.columns) // self.size):
            raise CheckpointError(
                f"{self.g_idx.path}: {self.g_idx.name} reorders the input channels, but "
                f"{self.where} does not set desc_act: set it to true there."
            )


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix [N, K] of a quantized checkpoint, called `name` if it were floats; `bits` is 4 or
    8. `symmetric`: without zero points. `half_scales`: its scales are float16. `read` reads what is
    needed before the first row; `path` and `nbytes` are those of its tensors."""

    name: str
    path: Path
    nbytes: int
    shape: tuple[int, int]
    bits: int
    groups: Groups
    symmetric: bool
    half_scales: bool
    read: Callable[[], Contents]

    def tensor(self) -> LazyTensor:
        """Return it as a lazy tensor with dequantized rows."""
        contents, groups = functools.cache(self._read), functools.cache(self.groups.of_channels)

        def rows(start: int, stop: int) -> Float32:
            read = contents()
            codes = unpack(read.rows(start, stop), self.bits)[:, : self.shape[1]]
            values = codes.astype(np.float32)
            # `take` is five times as fast as indexing.
            if read.zeros is None:
                values -= np.float32(1 << (self.bits - 1))
            else:
                values -= np.take(read.zeros[start:stop], groups(), axis=1)
            values *= np.take(read.scales[start:stop], groups(), axis=1)
            return values

        dtype = f"INT{self.bits}/{self.groups.size}"
        codes = BlockCodes(self.bits, self.groups.size)
        return LazyTensor(self.name, self.shape, dtype, self.nbytes, rows, codes)

    def coded(self) -> CodedMatrix:
        """Return its codes, scales and zero points as blocks of a package; raises
        `UnsupportedError` if its groups do not fit a block size."""
        columns, order = self.shape[1], self.groups.order()
        label = "" if order is None else hashlib.sha256(order.tobytes()).hexdigest()[:16]
        form: ScaleForm = "fp16" if self.half_scales else "plain"
        storage = RowBlocks(
            self.bits, self._block_size(), not self.symmetric, label, stored_scales=form
        )
        starts = np.arange(storage.num_blocks(columns)) * storage.block_size
        group = starts // self.groups.size  # [blocks]: a group may span several blocks
        contents = functools.cache(self._read)

        def blocks(start: int, stop: int) -> tuple[npt.NDArray[Any], ...]:
            read = contents()
            packed = read.rows(start, stop)
            if order is not None:
                packed = pack(np.take(unpack(packed, self.bits), order, axis=1), self.bits)
            missing = len(starts) * storage.block_bytes - packed.shape[1]  # of a partial block
            codes = np.pad(packed, ((0, 0), (0, missing))) if missing > 0 else packed
            codes = codes[:, : len(starts) * storage.block_bytes]  # a last word may be padded
            codes = codes.reshape(stop - start, len(starts), storage.block_bytes)
            scales = read.scales[start:stop, group]
            if read.zeros is None:
                return codes, scales
            return codes, scales, pack(read.zeros[start:stop, group], self.bits)

        return CodedMatrix(self.name, self.shape, storage, order, blocks)

    def _block_size(self) -> int:
        size = self.groups.size
        if size == self.shape[1]:
            return _WHOLE_ROW_BLOCK
        fitting = [block for block in BLOCK_SIZES if size % block == 0]
        if not fitting:
            raise UnsupportedError(
                f"{self.path}: {self.name} has groups of {size}, which is not a multiple of "
                f"{BLOCK_SIZES[0]}: pass --precision fp16 or fp32, which dequantize."
            )
        return max(fitting)

    def _read(self) -> Contents:
        self.groups.check_order()
        return self.read()


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
