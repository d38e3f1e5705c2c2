"""The kinds of storage of a matrix: which arrays each writes, and how.

A weight matrix W [N, K] (out_features, in_features) is stored as floats, or as blocks of codes of
2, 4 or 8 bits. Blocks run along K. They are laid out in rows of W, as ONNX Runtime's own operators
read them, or in columns, as ONNX's DequantizeLinear reads the right-hand matrix of a MatMul.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import BlockCodes, Float32
from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.exporter.model.scales import (
    SCALES,
    ScaleForm,
    representable,
    scale_parts,
    split_scales,
)
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import FloatName

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes that `MatMulNBits` accepts on the CPU."""

FLOAT_NAMES: tuple[FloatName, ...] = ("fp32", "fp16", "bf16")

WEIGHT, QWEIGHT, ZERO_POINTS, ORDER = "weight", "qweight", "zero_points", "order"
"""The parts of a stored matrix, with those of scales.py: floats have a weight; codes have a
qweight and scales, and may have a factor of the scales for each row, zero points and a column
order."""

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

_PIECE = 1 << 19  # codes packed at a time


@dataclass(frozen=True)
class Part:
    """One array of a stored matrix. `dtype` is `fp32`, `fp16`, `bf16`, `uint8`, `int8`, `int4` or
    `int64`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Quantized:
    """Rows of a matrix as codes, before a storage lays them out.

    `codes` uint8 [R, blocks * block_size], one code per byte, a partial last block padded; `scales`
    [R, blocks] in the storage's type; `zero_points` uint8 [R, blocks], or None if all are
    2^(bits-1). value = (code - zero point) * scale.
    """

    codes: Bytes
    scales: Array
    zero_points: Bytes | None = None


class Storage(Protocol):
    """How one matrix is stored."""

    @property
    def name(self) -> str:
        """`fp32`, `fp16`, `bf16`, `int8`, `int4` or `int2`."""
        ...

    @property
    def codes(self) -> BlockCodes | None:
        """Bits and block size of its codes; None for floats."""
        ...

    @property
    def unshared(self) -> tuple[str, ...]:
        """Parts of an embedding for which a tied head needs a separate initializer over the same
        bytes."""
        ...

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """Return the parts of a matrix of `shape`, in the order of their bytes in the data file.

        `gathered`: `GatherBlockQuantized` reads it row by row, and needs each row's codes flat.
        """
        ...

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Return `rows` [R, K] (or [R]) of a matrix as arrays, one for each part.

        Values that are not finite, or too large for a type, are not finite in an array of floats:
        the caller checks them.
        """
        ...

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Join the encoded `chunks` of a matrix of `shape`, which are in order: yield, for each
        part, an iterator over the arrays that make up its bytes.

        Exhaust each inner iterator before asking for the next one.
        """
        ...

    def joined_values(self, shape: tuple[int, ...]) -> int:
        """Return how many codes, one byte each, `join` holds in memory at once in addition to the
        chunks."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return its JSON form for the manifest and the journal."""
        ...


@dataclass(frozen=True)
class Floats:
    """Stored in the floating-point type called `name`."""

    name: FloatName

    @property
    def codes(self) -> None:
        """Floats are not in blocks."""

    @property
    def unshared(self) -> tuple[str, ...]:
        """None: a tied head reads the same initializer."""
        return ()

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """Return one part of the matrix's shape."""
        return (Part(WEIGHT, self.name, shape),)

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Return `rows` rounded to nearest."""
        with np.errstate(over="ignore"):
            return (rows.astype(DTYPES[self.name], copy=False),)

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Yield the chunks one after another."""
        return _stream(chunks)

    def joined_values(self, shape: tuple[int, ...]) -> int:
        """Return 0: no codes are held."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """Return its name."""
        return asdict(self)


class _Blocks(BlockCodes):
    """What both layouts of codes in blocks share."""

    @property
    def name(self) -> str:
        """`int2`, `int4` or `int8`."""
        return f"int{self.bits}"

    @property
    def codes(self) -> BlockCodes:
        """Itself."""
        return self


@dataclass(frozen=True)
class RowBlocks(_Blocks):
    """Stored as `com.microsoft.MatMulNBits` and `GatherBlockQuantized` read it: codes in rows,
    packed from the low bits up, one scale per block.

    value = (code - zero) * scale, where zero is 2^(bits-1), or with `zero_points` one code per
    block. If `order` is not empty, the columns are not in the order of the input channels, and the
    graph reorders the channels to match. `order` is a label; equal orders have equal labels.

    The operator reads scales of type `scales`; the file has them in the form `stored_scales`, which
    is `plain` unless `scales` is fp32.
    """

    zero_points: bool = False
    order: str = ""
    scales: FloatName = "fp32"
    stored_scales: ScaleForm = "plain"

    def __post_init__(self) -> None:
        """Check that the graph can make the scales."""
        assert self.stored_scales == "plain" or self.scales == "fp32", "the graph makes fp32 only"

    @property
    def unshared(self) -> tuple[str, ...]:
        """The codes: `GatherBlockQuantized` reads [N, bytes], `MatMulNBits` [N, blocks, bytes]."""
        return (QWEIGHT,)

    @property
    def block_bytes(self) -> int:
        """Bytes of the codes of one block."""
        return self.block_size * self.bits // 8

    def representable(self, scales: Float32) -> Float32:
        """Return, for each of `scales` [R, blocks], the nearest one that the file can hold.

        A scale above 0 never becomes 0. Call it before choosing codes: `encode` stores what it
        returns exactly. Scales in the form `uint8` cannot be negative; such a scale becomes 0.
        """
        return representable(self.stored_scales, self.scales, scales)

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """Return codes, scales and, if it has them, zero points and order."""
        rows, columns = shape
        blocks, width = self.num_blocks(columns), self.block_bytes
        codes = (rows, blocks * width) if gathered else (rows, blocks, width)
        scales = scale_parts(self.stored_scales, self.scales, rows, blocks)
        found = [Part(QWEIGHT, "uint8", codes), *(Part(*part) for part in scales)]
        if self.zero_points:
            found.append(Part(ZERO_POINTS, "uint8", (rows, -(-blocks * self.bits // 8))))
        if self.order:
            found.append(Part(ORDER, "int64", (columns,)))
        return tuple(found)

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Return codes [R, blocks, block bytes], the arrays of the scales and, if it has them, zero
        points [R, bytes]."""
        return self.encoded(quantize(rows, self))

    def stored(self, scales: Array) -> tuple[Array, ...]:
        """Return `scales` [R, blocks] as the arrays that the file has of them."""
        return split_scales(self.stored_scales, self.scales, scales)

    def encoded(self, found: Quantized) -> tuple[Array, ...]:
        """Return rows that are quantized already as `encode` does."""
        assert (found.zero_points is not None) == self.zero_points, "as the recipe says"
        packed = pack(found.codes, self.bits)
        codes = packed.reshape(*found.scales.shape, self.block_bytes)
        scales = self.stored(found.scales)
        if found.zero_points is None:
            return codes, *scales
        return codes, *scales, pack(found.zero_points, self.bits)

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Yield the codes as they come, then the scales and zero points, which are small."""
        return _stream(chunks)

    def joined_values(self, shape: tuple[int, ...]) -> int:
        """Return 0: no codes are held."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """Return its fields."""
        return {**asdict(self), "columnwise": False}


@dataclass(frozen=True)
class ColumnBlocks(_Blocks):
    """Stored as ONNX's DequantizeLinear reads the right-hand matrix [K, N] of a MatMul: signed
    codes with zero point 0, scales [blocks, N] of type `scales`."""

    scales: FloatName = "fp32"

    @property
    def unshared(self) -> tuple[str, ...]:
        """Codes and scales: ONNX Runtime fuses a DequantizeLinear with a MatMul only if no other
        node reads its inputs."""
        return (QWEIGHT, SCALES)

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """Return codes and scales, the same whether gathered or not."""
        rows, columns = shape
        return (
            Part(QWEIGHT, f"int{self.bits}", (columns, rows)),
            Part(SCALES, self.scales, (self.num_blocks(columns), rows)),
        )

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Return codes [K, R], one per byte in two's complement, and scales [blocks, R]."""
        found = quantize(rows, self)
        assert found.zero_points is None, "signed codes have zero point 0"
        half, mask = 1 << (self.bits - 1), (1 << self.bits) - 1
        return ((found.codes[:, : rows.shape[1]] - half) & mask).T, found.scales.T

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Assemble the whole matrix first: each row of the file holds values of every source
        row."""
        rows, columns = shape
        codes = np.empty((columns, rows), np.uint8)
        scales = np.empty((self.num_blocks(columns), rows), DTYPES[self.scales])
        start = 0
        for part, part_scales in chunks:
            stop = start + part.shape[1]
            codes[:, start:stop], scales[:, start:stop] = part, part_scales
            start = stop
        yield _packed_in_pieces(codes.reshape(-1), self.bits)
        yield iter([scales])

    def joined_values(self, shape: tuple[int, ...]) -> int:
        """Return the number of codes in the matrix: all are held."""
        return prod(shape)

    def to_json(self) -> dict[str, Any]:
        """Return its fields, under the same keys as `RowBlocks`."""
        rest = {"zero_points": False, "order": "", "stored_scales": "plain", "columnwise": True}
        return {**asdict(self), **rest}


Blocks = RowBlocks | ColumnBlocks
Quantize = Callable[[Float32, Blocks], Quantized]
"""A quantizer's function: rows [R, K] and a storage -> the codes of the rows."""


def make_storage(
    name: str, block_size: int, *, scales: FloatName = "fp32", columnwise: bool = False
) -> Storage:
    """Return the storage called `name`: `fp32`, `fp16`, `bf16`, `int8` or `int4`.

    `block_size`, `scales` and `columnwise` (`ColumnBlocks` instead of `RowBlocks`) apply to codes
    only. Raises `UsageError` for another name, or a block size that is not in `BLOCK_SIZES`.
    """
    if floats := [known for known in FLOAT_NAMES if known == name]:
        return Floats(floats[0])
    if name not in ("int8", "int4"):
        raise UsageError(f"unknown precision {name!r}: use fp32, fp16, bf16, int8 or int4.")
    if block_size not in BLOCK_SIZES:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise UsageError(f"block size {block_size} is not one of {known}.")
    kind = ColumnBlocks if columnwise else RowBlocks
    return kind(int(name[3:]), block_size, scales=scales)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Return codes [..., n], one per byte, packed at `bits` each: the first in the lowest bits of a
    byte. A byte that the last codes do not fill is padded with zeros."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    if missing := -codes.shape[-1] % per_byte:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], missing), np.uint8)], axis=-1)
    if bits == 4:
        pairs = np.ascontiguousarray(codes).view("<u2")
        return np.asarray((pairs | pairs >> 4).astype(np.uint8))
    fours = np.ascontiguousarray(codes).view("<u4")
    return np.asarray((fours | fours >> 6 | fours >> 12 | fours >> 18).astype(np.uint8))


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Return bytes [R, m] as codes [R, 8 m / bits], one per byte: the inverse of `pack`."""
    if bits == 8:
        return packed
    per_byte, mask = 8 // bits, np.uint8((1 << bits) - 1)
    codes = np.empty((packed.shape[0], packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        codes[:, place::per_byte] = packed >> np.uint8(bits * place) & mask
    return codes


def _stream(chunks: Iterable[Sequence[Array]]) -> Iterator[Iterator[Array]]:
    later: list[Sequence[Array]] = []

    def first() -> Iterator[Array]:
        for array, *others in chunks:
            later.append(others)
            yield array

    yield first()
    yield from map(iter, zip(*later, strict=True))


def _packed_in_pieces(codes: Bytes, bits: int) -> Iterator[Array]:
    """Yield `codes` packed, piece by piece; each piece but the last fills its bytes."""
    for start in range(0, len(codes), _PIECE):
        yield pack(codes[start : start + _PIECE], bits)
