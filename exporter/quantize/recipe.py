"""Which matrix is stored how. A recipe is plain data: it goes into the manifest as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llama_onnx.targets.errors import UsageError

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes `MatMulNBits` takes on the CPU."""

LogitsMode = Literal["all", "last"]


@dataclass(frozen=True)
class Float:
    """Stored as it is, in IEEE floating point of `bits` (16 or 32); computed in float32."""

    bits: int

    @property
    def name(self) -> str:
        """`fp32` or `fp16`."""
        return f"fp{self.bits}"


@dataclass(frozen=True)
class Blocks:
    """Stored as unsigned codes of `bits`; `block_size` along the input share a float32 scale.

    value = (code - zero) * scale, as `com.microsoft.MatMulNBits` and `GatherBlockQuantized` read
    it; zero is 2^(bits-1), or with `zero_points` a code that each block has of its own. With
    `order` the columns do not stand as the input's channels do, and the graph rearranges these; it
    is a name: equal orders have equal names.
    """

    bits: int
    block_size: int
    zero_points: bool = False
    order: str = ""

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


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a package's content besides the weights themselves.

    `taken_over` names the tensors whose codes are the source's own, and how they are stored.
    `swappable` are the kinds of matrices (`q_proj`) that take a LoRA adapter at run time, in every
    layer.
    """

    precision: str
    linear: Storage
    embedding: Storage
    head: Storage
    quantizer: str = "rtn"
    accuracy_level: int = 4
    fuse_gate_up: bool = False
    logits: LogitsMode = "all"
    taken_over: Mapping[str, Blocks] = field(default_factory=dict)
    swappable: tuple[str, ...] = ()

    def storage_of(self, tensors: Sequence[str], otherwise: Storage) -> Storage:
        """How the rows of `tensors` are stored in one matrix: as they come, or `otherwise`."""
        assert self.fit_together(tensors)
        return self.taken_over.get(tensors[0], otherwise)

    def fit_together(self, tensors: Sequence[str]) -> bool:
        """Whether the rows of `tensors` can stand in one matrix."""
        return len({self.taken_over.get(name) for name in tensors}) == 1

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, for the manifest and the journal; of the tensors taken over how
        many are stored in which way."""
        ways = Counter((b.bits, b.block_size, bool(b.order)) for b in self.taken_over.values())
        counts = [
            {"bits": bits, "block_size": size, "reordered": reordered, "tensors": count}
            for (bits, size, reordered), count in sorted(ways.items())
        ]
        return {**asdict(replace(self, taken_over={})), "taken_over": counts}


def storage(name: str, block_size: int) -> Storage:
    """`fp32`, `fp16`, `int8` or `int4` as a `Storage`; raises `UsageError` for anything else."""
    if name in ("fp32", "fp16"):
        return Float(int(name[2:]))
    if name in ("int8", "int4"):
        if block_size not in BLOCK_SIZES:
            known = ", ".join(map(str, BLOCK_SIZES))
            raise UsageError(f"block size {block_size} is not one of {known}.")
        return Blocks(int(name[3:]), block_size)
    raise UsageError(f"unknown precision {name!r}: take fp32, fp16, int8 or int4.")


def make_recipe(
    precision: str,
    *,
    tied: bool,
    block_size: int = 32,
    quantizer: str = "rtn",
    embedding: str | None = None,
    head: str | None = None,
    accuracy_level: int = 4,
    fuse_gate_up: bool = False,
    logits: LogitsMode = "all",
) -> Recipe:
    """Fill in what the user left open. `tied`: embedding and head are one matrix, stored once.

    Raises `UsageError` for an unknown precision or block size, or when a tied model is asked to
    store its one matrix in two ways.
    """
    if tied and embedding and head and embedding != head:
        raise UsageError(
            f"the model ties embedding and head, so they cannot be stored as {embedding} and "
            f"{head}: give one of the two options."
        )
    if tied:
        embedding = head = embedding or head
    # The embedding is the model's input and is read a row at a time: eight bits cost no time there.
    # A separate head is read whole for every token, so it is stored like the other matrices.
    careful = "int8" if precision == "int4" else precision
    return Recipe(
        precision=precision,
        quantizer=quantizer,
        linear=storage(precision, block_size),
        embedding=storage(embedding or careful, block_size),
        head=storage(head or (careful if tied else precision), block_size),
        accuracy_level=accuracy_level,
        fuse_gate_up=fuse_gate_up,
        logits=logits,
    )
