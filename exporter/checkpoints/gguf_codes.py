"""The codes in a GGUF file's blocks, as a package can keep them.

A block of Q4_0, Q5_0 or Q8_0 has 32 codes and one scale d, half of them symmetric around zero:
weight = code * d. A block of Q6_K has 256 codes, an 8-bit scale for each 16 of them and one scale d
for all: weight = code * (scale * d), and that product is exact in float32. Codes of 5 and 6 bits
are kept as 8-bit ones. The layouts are those of ggml-quants.h in https://github.com/ggml-org/ggml.

Q4_1, Q5_1, Q4_K and Q5_K add a minimum to each block. ONNX Runtime's operators read zero points,
which are codes, and no minima of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from llama_onnx.exporter.formats.tensor import Float32, widen
from llama_onnx.exporter.model.checkpoint import CodedMatrix
from llama_onnx.exporter.model.storage import RowBlocks, pack
from llama_onnx.targets.target import FloatName

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Coding:
    """How a package keeps the codes of one type: `bits` each, a scale for each `block_size` of
    them. `scales` is the smallest type that holds the scales exactly.

    `read(blocks)` turns the file's blocks [n, block bytes] into codes [n, codes per block], one a
    byte, of which 2^(bits-1) is zero, and scales [n, codes per block / block_size].
    """

    bits: int
    block_size: int
    scales: FloatName
    read: Callable[[Bytes], tuple[Bytes, Float32]]


def _read_q4_0(blocks: Bytes) -> tuple[Bytes, Float32]:
    return _nibbles(blocks[:, 2:]), _half(blocks)


def _read_q5_0(blocks: Bytes) -> tuple[Bytes, Float32]:
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    codes = _nibbles(blocks[:, 6:]) | high << np.uint8(4)
    return codes + np.uint8(128 - 16), _half(blocks)


def _read_q8_0(blocks: Bytes) -> tuple[Bytes, Float32]:
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks)  # two's complement plus 128


def _read_q6_k(blocks: Bytes) -> tuple[Bytes, Float32]:
    low, high, scales, d = np.split(blocks, (128, 192, 208), axis=1)
    # Two halves of 128 codes: their low bits are in 64 bytes, two a byte, 64 codes apart; their
    # high bits in 32 bytes, four a byte, 32 codes apart.
    fours = low.reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & np.uint8(15)
    twos = high.reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    codes = fours.reshape(-1, 256) | twos.reshape(-1, 256) << np.uint8(4)
    factors = np.ascontiguousarray(scales).view(np.int8).astype(np.float32)
    return codes + np.uint8(128 - 32), _half(d) * factors


def _nibbles(packed: Bytes) -> Bytes:
    """Return the codes in 16 bytes [n, 16] as [n, 32]: the low nibbles, then the high ones."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _half(blocks: Bytes) -> Float32:
    """Return the scale in the first two bytes of each block, [n, 1]."""
    return widen(np.ascontiguousarray(blocks[:, :2]).view("<f2"))


CODINGS: Mapping[Type, Coding] = {
    Type.Q4_0: Coding(4, 32, "fp16", _read_q4_0),
    Type.Q5_0: Coding(8, 32, "fp16", _read_q5_0),
    Type.Q8_0: Coding(8, 32, "fp16", _read_q8_0),
    Type.Q6_K: Coding(8, 16, "fp32", _read_q6_k),
}
"""The types whose codes a package can keep."""

WITH_MINIMA = {Type.Q4_1: 4, Type.Q4_K: 4, Type.Q5_1: 5, Type.Q5_K: 5}
"""The types whose codes it cannot keep, with the bits of a code."""


def package_blocks(rows: Bytes, kind: Type) -> tuple[Bytes, Float32]:
    """Return `rows` [R, bytes] of a matrix stored as `kind`, one of `CODINGS`, as a package stores
    them: packed codes [R, blocks, block bytes] and scales [R, blocks]."""
    coding, count = CODINGS[kind], len(rows)
    codes, scales = coding.read(rows.reshape(-1, GGML_QUANT_SIZES[kind][1]))
    packed = pack(codes.reshape(-1, coding.block_size), coding.bits)
    blocks = scales.size // count
    return packed.reshape(count, blocks, -1), scales.reshape(count, blocks)


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix that a GGUF file holds in blocks of codes. `rows(start, stop)` reads its rows as
    bytes [R, bytes], in Hugging Face's order."""

    name: str
    shape: tuple[int, ...]
    type: Type
    rows: Callable[[int, int], Bytes]

    @property
    def bits(self) -> int:
        """Bits of a package's code if it can keep them, else of the file's."""
        kept = CODINGS.get(self.type)
        return kept.bits if kept else WITH_MINIMA[self.type]

    def obstacle(self, scales: FloatName) -> str | None:
        """Return why a package with scales of the type `scales` cannot keep its codes; None if it
        can."""
        coding = CODINGS.get(self.type)
        if coding is None:
            return "their blocks have minima, which a package cannot hold"
        exact = scales in ("fp32", coding.scales)
        return None if exact else f"their scales are not exact in {scales}"

    def coded(self) -> CodedMatrix:
        """Return its codes as blocks of a package."""
        coding = CODINGS[self.type]
        storage = RowBlocks(coding.bits, coding.block_size)

        def blocks(start: int, stop: int) -> tuple[Bytes, Float32]:
            return package_blocks(self.rows(start, stop), self.type)

        return CodedMatrix(self.name, self.shape, storage, None, blocks)
