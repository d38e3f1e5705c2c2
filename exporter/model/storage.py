"""The kinds of storage of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import FloatName

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes `MatMulNBits` takes on the CPU."""

FLOAT_NAMES: tuple[FloatName, ...] = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Float:
    """Stored as it is, in floating point called `name`."""

    name: FloatName


@dataclass(frozen=True)
class Blocks:
    """Stored as codes of `bits`; `block_size` along the input share a scale, of type `scales`.

    value = (code - zero) * scale, as `com.microsoft.MatMulNBits` and `GatherBlockQuantized` read
    it; zero is 2^(bits-1), or with `zero_points` a code that each block has of its own. With
    `order` the columns do not stand as the input's channels do, and the graph rearranges these; it
    is a name: equal orders have equal names.

    `columnwise`: as ONNX's own DequantizeLinear reads a matrix that is multiplied from the right,
    with signed codes [in_features, out_features] whose zero is 0.
    """

    bits: int
    block_size: int
    zero_points: bool = False
    order: str = ""
    scales: FloatName = "fp32"
    columnwise: bool = False

    @property
    def name(self) -> str:
        """`int4` or `int8`."""
        return f"int{self.bits}"

    def num_blocks(self, columns: int) -> int:
        """Blocks in a row of `columns`; the last one may be partial."""
        return -(-columns // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes the codes of one block take."""
        return self.block_size * self.bits // 8

    def zero_bytes(self, columns: int) -> int:
        """Bytes the zero points of one row of `columns` take, the last one perhaps in part."""
        return -(-self.num_blocks(columns) * self.bits // 8)


Storage = Float | Blocks


def storage(
    name: str, block_size: int, *, scales: FloatName = "fp32", columnwise: bool = False
) -> Storage:
    """`fp32`, `fp16`, `bf16`, `int8` or `int4` as a `Storage`; raises `UsageError` for another."""
    if floats := [known for known in FLOAT_NAMES if known == name]:
        return Float(floats[0])
    if name in ("int8", "int4"):
        if block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise UsageError(f"block size {block_size} is not one of {known}.")
        return Blocks(int(name[3:]), block_size, scales=scales, columnwise=columnwise)
    raise UsageError(f"unknown precision {name!r}: take fp32, fp16, bf16, int8 or int4.")
