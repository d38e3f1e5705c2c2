"""Which matrix is stored how. A recipe is plain data: it goes into the manifest as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import FloatName, Operators

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Block sizes `MatMulNBits` takes on the CPU."""

FLOAT_NAMES: tuple[FloatName, ...] = ("fp32", "fp16", "bf16")
LogitsMode = Literal["all", "last"]


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


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a package's content besides the weights themselves.

    `taken_over` names the tensors whose codes are the source's own, and how they are stored.
    `swappable` are the kinds of matrices (`q_proj`) that take a LoRA adapter at run time, in every
    layer. `activations` is what flows between the `operators`.
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
    activations: FloatName = "fp32"
    operators: Operators = field(default_factory=Operators)

    def storage_of(self, tensors: Sequence[str], otherwise: Storage) -> Storage:
        """How the rows of `tensors` are stored in one matrix: as they come, or `otherwise`."""
        assert self.fit_together(tensors)
        return self.taken_over.get(tensors[0], otherwise)

    def fit_together(self, tensors: Sequence[str]) -> bool:
        """Whether the rows of `tensors` can stand in one matrix."""
        return len({self.taken_over.get(name) for name in tensors}) == 1

    def packs(self, projections: Sequence[str]) -> bool:
        """Whether query, key and value stand in one matrix: the attention has to take it so, and a
        source's own codes may differ from one projection to the next."""
        together = self.operators.packed_qkv and not self.operators.standard
        return together and self.fit_together(projections)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, for the manifest and the journal; of the tensors taken over how
        many are stored in which way."""
        ways = Counter((b.bits, b.block_size, bool(b.order)) for b in self.taken_over.values())
        counts = [
            {"bits": bits, "block_size": size, "reordered": reordered, "tensors": count}
            for (bits, size, reordered), count in sorted(ways.items())
        ]
        return {**asdict(replace(self, taken_over={})), "taken_over": counts}


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
    activations: FloatName = "fp32",
    operators: Operators = Operators(),  # noqa: B008
) -> Recipe:
    """Fill in what the user left open. `tied`: embedding and head are one matrix, stored once.

    Raises `UsageError` for an unknown precision or block size, when a tied model is asked to store
    its one matrix in two ways, or for an embedding that `operators` cannot read.
    """
    if tied and embedding and head and embedding != head:
        raise UsageError(
            f"the model ties embedding and head, so they cannot be stored as {embedding} and "
            f"{head}: give one of the two options."
        )
    if tied:
        embedding = head = embedding or head
    careful = _careful(precision, activations, operators)
    readable = _readable(operators)
    if embedding and embedding.startswith("int") and embedding not in readable:
        known = ", ".join(readable) or "none that is quantized"
        raise UsageError(
            f"the target has no operator that reads an embedding of {embedding}: it reads {known}."
        )

    def stored(name: str) -> Storage:
        return storage(name, block_size, scales=activations, columnwise=operators.standard)

    return Recipe(
        precision=precision,
        quantizer=quantizer,
        linear=stored(precision),
        embedding=stored(embedding or careful),
        head=stored(head or (careful if tied else precision)),
        accuracy_level=accuracy_level,
        fuse_gate_up=fuse_gate_up,
        logits=logits,
        activations=activations,
        operators=operators,
    )


def _careful(precision: str, activations: FloatName, operators: Operators) -> str:
    """How the embedding is stored if nobody says. It is the model's input and is read a row at a
    time: eight bits cost no time there. A separate head is read whole for every token, so it is
    stored like the other matrices."""
    if not precision.startswith("int"):
        return precision
    return "int8" if "int8" in _readable(operators) else activations


def _readable(operators: Operators) -> tuple[str, ...]:
    """The quantized types of which single rows can be read."""
    if operators.standard:
        return ("int8",)  # Gather has no type of four bits
    return ("int8", "int4") if operators.gather_blocks else ()
