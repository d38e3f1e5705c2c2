"""The kinds of storage of a matrix: what each writes, and how.

A weight matrix W [N, K] (out_features, in_features) is stored as floats, or as codes of 4 or 8 bits
in blocks. Blocks run along K and are laid out in rows of W, as ONNX Runtime's own operators read
them, or in columns, as ONNX's DequantizeLinear reads a matrix that is multiplied from the right.
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
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import FloatName

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes `MatMulNBits` takes on the CPU."""

FLOAT_NAMES: tuple[FloatName, ...] = ("fp32", "fp16", "bf16")

WEIGHT, QWEIGHT, SCALES, ZERO_POINTS, ORDER = "weight", "qweight", "scales", "zero_points", "order"
"""The parts that a matrix is stored in: floats have a weight, codes a qweight and scales, perhaps
zero points and the order of their columns."""

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

    `codes` uint8 [R, blocks * block_size], one in a byte, a partial last block filled up; `scales`
    [R, blocks] in the storage's type; `zero_points` uint8 [R, blocks], None for 2^(bits-1)
    throughout. value = (code - zero point) * scale.
    """

    codes: Bytes
    scales: Array
    zero_points: Bytes | None = None


class Storage(Protocol):
    """How one matrix is stored."""

    @property
    def name(self) -> str:
        """`fp32`, `fp16`, `bf16`, `int8` or `int4`."""
        ...

    @property
    def codes(self) -> BlockCodes | None:
        """Bits and blocks of its codes; None for floats."""
        ...

    @property
    def unshared(self) -> tuple[str, ...]:
        """Parts of an embedding that a head tied to it cannot read through the same initializer,
        but needs one of its own for, over the same bytes."""
        ...

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """Return the parts of a matrix of `shape`, in the order of their bytes in the data file.

        `gathered`: read row by row by `GatherBlockQuantized`, which wants the codes flat.
        """
        ...

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Return `rows` [R, K] (or [R]) of a matrix as arrays, one for each of its parts.

        The second of them, or the only one, holds floats, which overflow to infinity: the caller
        checks them.
        """
        ...

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Put the `chunks` of a matrix of `shape`, encoded in order, together: yield for each part
        the arrays that make up its bytes.

        Each inner iterator has to be exhausted before the next one is asked for.
        """
        ...

    def joined_values(self, shape: tuple[int, ...]) -> int:
        """How many codes of a matrix `join` holds in memory at once, in a byte each, beyond its
        chunks."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest and the journal hold it."""
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
        """A tied head reads the very same initializer."""
        return ()

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """One array of the matrix's own shape."""
        return (Part(WEIGHT, self.name, shape),)

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Round to nearest."""
        with np.errstate(over="ignore"):
            return (rows.astype(DTYPES[self.name], copy=False),)

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Rows follow one another."""
        return _stream(chunks)

    def joined_values(self, shape: tuple[int, ...]) -> int:
        """Nothing is held."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """Return its name."""
        return asdict(self)


@dataclass(frozen=True)
class RowBlocks(BlockCodes):
    """Stored as `com.microsoft.MatMulNBits` and `GatherBlockQuantized` read it: codes in rows,
    packed from the low bits up, one scale of type `scales` a block.

    value = (code - zero) * scale, where zero is 2^(bits-1), or with `zero_points` a code for each
    block. With `order` the columns are not in the order of the input's channels, and the graph
    rearranges these; it is a name, and equal orders have equal names.
    """

    zero_points: bool = False
    order: str = ""
    scales: FloatName = "fp32"

    @property
    def name(self) -> str:
        """`int4` or `int8`."""
        return f"int{self.bits}"

    @property
    def codes(self) -> BlockCodes:
        """Itself."""
        return self

    @property
    def unshared(self) -> tuple[str, ...]:
        """`GatherBlockQuantized` wants codes [N, bytes], `MatMulNBits` [N, blocks, bytes]."""
        return (QWEIGHT,)

    @property
    def block_bytes(self) -> int:
        """Bytes the codes of one block take."""
        return self.block_size * self.bits // 8

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """Codes, scales and, where it has them, zero points and order."""
        rows, columns = shape
        blocks, width = self.num_blocks(columns), self.block_bytes
        codes = (rows, blocks * width) if gathered else (rows, blocks, width)
        found = [Part(QWEIGHT, "uint8", codes), Part(SCALES, self.scales, (rows, blocks))]
        if self.zero_points:
            found.append(Part(ZERO_POINTS, "uint8", (rows, -(-blocks * self.bits // 8))))
        if self.order:
            found.append(Part(ORDER, "int64", (columns,)))
        return tuple(found)

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Codes [R, blocks, block bytes], scales [R, blocks], zero points [R, bytes] if any."""
        found = quantize(rows, self)
        assert (found.zero_points is not None) == self.zero_points, "the recipe knows its quantizer"
        packed = pack(found.codes, self.bits)
        codes = packed.reshape(*found.scales.shape, self.block_bytes)
        if found.zero_points is None:
            return codes, found.scales
        return codes, found.scales, pack(found.zero_points, self.bits)

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Codes pass through; scales and zero points, which are small, wait until they are out."""
        return _stream(chunks)

    def joined_values(self, shape: tuple[int, ...]) -> int:
        """No codes are held."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """Return its fields."""
        return {**asdict(self), "columnwise": False}


@dataclass(frozen=True)
class ColumnBlocks(BlockCodes):
    """Stored as ONNX's DequantizeLinear reads a matrix [K, N] that is multiplied from the right:
    signed codes whose zero is 0, scales [blocks, N] of type `scales`."""

    scales: FloatName = "fp32"

    @property
    def name(self) -> str:
        """`int4` or `int8`."""
        return f"int{self.bits}"

    @property
    def codes(self) -> BlockCodes:
        """Itself."""
        return self

    @property
    def unshared(self) -> tuple[str, ...]:
        """ONNX Runtime fuses a DequantizeLinear with a MatMul only if no other node reads what it
        reads."""
        return (QWEIGHT, SCALES)

    def parts(self, shape: tuple[int, ...], *, gathered: bool = False) -> tuple[Part, ...]:
        """Codes and scales; gathered or not, they are the same."""
        rows, columns = shape
        return (
            Part(QWEIGHT, f"int{self.bits}", (columns, rows)),
            Part(SCALES, self.scales, (self.num_blocks(columns), rows)),
        )

    def encode(self, rows: Float32, quantize: Quantize) -> tuple[Array, ...]:
        """Codes [K, R], one in a byte, the bits of signed ones; scales [blocks, R]."""
        found = quantize(rows, self)
        assert found.zero_points is None, "signed codes, whose zero is 0"
        half, mask = 1 << (self.bits - 1), (1 << self.bits) - 1
        return ((found.codes[:, : rows.shape[1]] - half) & mask).T, found.scales.T

    def join(
        self, chunks: Iterable[Sequence[Array]], shape: tuple[int, ...]
    ) -> Iterator[Iterator[Array]]:
        """Every row of the file has something of every row of the source, so the whole matrix is
        put together first."""
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
        """All of them."""
        return prod(shape)

    def to_json(self) -> dict[str, Any]:
        """Return its fields, under the keys that `RowBlocks` has too."""
        return {**asdict(self), "zero_points": False, "order": "", "columnwise": True}


Blocks = RowBlocks | ColumnBlocks
Quantize = Callable[[Float32, Blocks], Quantized]
"""Rows [R, K] -> their codes for a storage: what a quantizer does."""


def make_storage(
    name: str, block_size: int, *, scales: FloatName = "fp32", columnwise: bool = False
) -> Storage:
    """Return the storage called `name`: `fp32`, `fp16`, `bf16`, `int8` or `int4`.

    `block_size`, `scales` and `columnwise` (`ColumnBlocks` or `RowBlocks`) are for codes. Raises
    `UsageError` for another name, or a block size that is not one of `BLOCK_SIZES`.
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
    """Return codes [..., n], one in a byte, packed as `bits` each: of two of four bits the first
    becomes the low nibble, and an odd last one gets a nibble of zeros beside it."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    pairs = np.ascontiguousarray(codes).view("<u2")
    return np.asarray((pairs | pairs >> 4).astype(np.uint8))


def _stream(chunks: Iterable[Sequence[Array]]) -> Iterator[Iterator[Array]]:
    later: list[Sequence[Array]] = []

    def first() -> Iterator[Array]:
        for array, *others in chunks:
            later.append(others)
            yield array

    yield first()
    yield from map(iter, zip(*later, strict=True))


def _packed_in_pieces(codes: Bytes, bits: int) -> Iterator[Array]:
    """Pack `codes` one after the other; pieces of an even number keep pairs together."""
    for start in range(0, len(codes), _PIECE):
        yield pack(codes[start : start + _PIECE], bits)
