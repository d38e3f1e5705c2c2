"""A tensor in a file, read a few rows at a time.

A `LazyTensor` has a shape and reads rows on demand, so that only a few rows of a 70B model are in
memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llama_onnx.targets.errors import CheckpointError, UnsupportedError

Float32 = npt.NDArray[np.float32]

_FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

MAX_NAME = 512
"""Longest name of a tensor."""

_HALF_BITS = np.uint32(0x8FFFE000).astype(np.int32)
"""Mask of sign, exponent and fraction of a float16, sign-extended and shifted left by 13 bits."""


_PIECE = 1 << 22  # values compared at a time
_CACHED = 1 << 16  # values widened at a time: they stay in the processor's cache


@dataclass(frozen=True)
class BlockCodes:
    """Codes of `bits` bits each; every `block_size` consecutive codes of a row share a scale."""

    bits: int
    block_size: int

    def num_blocks(self, columns: int) -> int:
        """Return the number of blocks in a row of `columns`; the last one may be partial."""
        return -(-columns // self.block_size)

    def step(self, values: Float32) -> Float32:
        """Return the quantization step at each of `values` [R, K]: the largest magnitude of its
        block over 2^(bits-1)."""
        columns = values.shape[1]
        padded = np.pad(np.abs(values), ((0, 0), (0, -columns % self.block_size)))
        largest = padded.reshape(len(values), -1, self.block_size).max(axis=2)  # [R, blocks]
        return np.repeat(largest / 2 ** (self.bits - 1), self.block_size, axis=1)[:, :columns]


Bounds = tuple[Float32, Float32]
"""The least and the greatest value that each block of some rows can hold, [R, blocks]."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk.

    `rows(start, stop)` reads float32 rows `[start, stop)` of the first axis: shape
    `(stop - start, *shape[1:])`. It may be called from several threads. `dtype` is the storage type
    for display ("F16", "BF16", "Q4_K"; "INT4/32" for 4-bit codes in blocks of 32), `nbytes` its
    size on disk. `codes` has the bits and block size of a matrix stored as codes with one scale per
    block; None for any other. `problem` is the sentence that refuses to read rows of a type that is
    not supported; None if they can be read. `bounds(start, stop)` returns the range of each block
    of codes in those rows, where that is known.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    rows: Callable[[int, int], Float32]
    codes: BlockCodes | None = None
    problem: str | None = None
    bounds: Callable[[int, int], Bounds | None] | None = None

    def step(self, values: Float32) -> Float32:
        """Return the distance between adjacent representable values at each of `values` [R, K] (or
        [K]), for this tensor's storage type; 0 for float32.

        Raises `UnsupportedError` for a tensor stored as neither codes in blocks nor floats.
        """
        if self.codes is not None:
            return self.codes.step(values)
        if self.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{self.name} is stored as {self.dtype}, which has no single quantization step."
            )
        return float_step(values, _FLOATS[self.dtype])


def float_step(values: Float32, dtype: np.dtype[Any]) -> Float32:
    """Return the distance between adjacent numbers of `dtype` at each of `values`; 0 for float32,
    in which the values are exact."""
    if dtype == np.float32:
        return np.zeros_like(values)
    with np.errstate(over="ignore"):
        rounded = np.abs(values).astype(dtype)
    step: Float32 = np.spacing(rounded).astype(np.float32)
    return step


@dataclass(frozen=True)
class StoredTensor:
    """The location of a tensor's values in a file, stored row by row. `dtype` is the numpy type,
    None for an unsupported one; `code` is the format's name for it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    code: str
    dtype: np.dtype[Any] | None
    offset: int
    nbytes: int

    def read(self) -> npt.NDArray[Any]:
        """Return all values, in their stored type; a single number as [1]."""
        return self.values(0, self.shape[0] if self.shape else 1)

    def lazy(self) -> LazyTensor:
        """Return it as a lazy tensor; reading its rows raises `UnsupportedError` unless the values
        are floats."""
        problem = None
        if self.dtype is None or self.dtype.kind in "iu":
            problem = describe_unreadable(self.path, self.name, self.code)
        return LazyTensor(
            self.name, self.shape, self.code, self.nbytes, self._rows, problem=problem
        )

    def _rows(self, start: int, stop: int) -> Float32:
        if self.dtype is None or self.dtype.kind in "iu":
            raise UnsupportedError(describe_unreadable(self.path, self.name, self.code))
        return widen(self.values(start, stop))

    def values(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows [start, stop), in their stored type."""
        assert self.dtype is not None
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        offset = self.offset + start * width * self.dtype.itemsize
        values = read_values(self.path, self.dtype, (stop - start) * width, offset, self.name)
        return values.reshape(stop - start, *self.shape[1:])


def damaged_rows(name: str, start: int, stop: int) -> CheckpointError:
    """Return the error for rows [start, stop) of tensor `name` that are not finite."""
    return CheckpointError(
        f"{name}, rows {start} to {stop - 1}: the weights hold NaN or infinity: the checkpoint is "
        "damaged, or its training diverged."
    )


def describe_unreadable(path: Path, name: str, code: str) -> str:
    """Return the sentence that refuses a tensor of the type `code`, which is not a float type that
    is read."""
    return (
        f"{path}: {name} is stored as {code}, which is not supported: export weights in F32, "
        "F16 or BF16."
    )


def same_values(one: LazyTensor, other: LazyTensor) -> bool:
    """Return whether two tensors have the same shape and values. Reads them in pieces, up to the
    first difference."""
    if one.shape != other.shape:
        return False
    if not one.shape:
        return one.nbytes == other.nbytes
    count = one.shape[0]
    width = int(np.prod(one.shape[1:], dtype=np.int64))
    rows = max(1, _PIECE // max(1, width))
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        if not np.array_equal(one.rows(start, stop), other.rows(start, stop), equal_nan=True):
            return False
    return True


def read_values(
    path: Path, dtype: np.dtype[Any], count: int, offset: int, name: str
) -> npt.NDArray[Any]:
    """Read `count` values of the tensor `name` at byte `offset` of `path`.

    The file is read, not mapped: nothing stays resident, and a file truncated since it was opened
    raises `CheckpointError` instead of crashing the process.
    """
    values = np.fromfile(path, dtype, count, offset=offset)
    if values.size < count:
        raise CheckpointError(f"{path} ends within {name}: it changed since it was opened.")
    return values


def widen(values: npt.NDArray[Any]) -> Float32:
    """Return `values` of any float type as float32, exactly.

    For float16 this is twice as fast as numpy: the bits are shifted to their float32 positions,
    and a multiplication corrects the exponent's bias, for subnormals too. Infinities and NaN would
    become 65536 or more, so arrays that contain them are converted by numpy.
    """
    if values.dtype != np.float16:
        return values.astype(np.float32, copy=False)
    flat = values.reshape(-1)
    widened = np.empty(flat.shape, np.float32)
    for start in range(0, flat.size, _CACHED):
        _widen_into(widened[start : start + _CACHED], flat[start : start + _CACHED])
    return widened.reshape(values.shape)


def _widen_into(widened: Float32, values: npt.NDArray[np.float16]) -> None:
    bits = widened.view(np.int32)
    bits[:] = values.view(np.int16)
    bits <<= 13
    bits &= _HALF_BITS
    widened *= np.float32(2.0**112)
    if widened.max() >= 2.0**16 or widened.min() <= -(2.0**16):
        widened[:] = values


def check_name(path: Path, name: str) -> None:
    """Raise `CheckpointError` for a tensor's name that is not a short text that can be printed."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path} has a tensor called {name[:100]!r}: download it again.")


def file_fingerprint(paths: Iterable[Path]) -> dict[str, str]:
    """Return size and modification time of each file, enough to detect that a source changed."""
    stats = {path.name: path.stat() for path in sorted(paths)}
    return {name: f"{stat.st_size} bytes, mtime {stat.st_mtime_ns}" for name, stat in stats.items()}
