"""How each matrix is stored. A recipe is plain data and is written to the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llama_onnx.exporter.model.scales import ScaleForm
from llama_onnx.exporter.model.storage import TWO_BIT_BLOCKS, RowBlocks, Storage, make_storage
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.target import FloatName, Operators

EMBEDDING_BLOCK = 64
"""Values that share a scale in an embedding of 8 bits beside calibrated matrices."""

LogitsMode = Literal["all", "last"]
CacheMode = Literal["int8"]


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a package's content besides the weights.

    `source_codes` maps each tensor whose codes come from the source unchanged to their storage;
    `chosen` maps other tensors that are not stored as `linear`, `embedding` and `head` say.
    `quantized_here` is the number of the decoder's other matrices, if there are any such tensors.
    `swappable` are the kinds of matrices (such as `q_proj`) that accept a LoRA adapter at run time,
    in every layer. `activations` is the type of the values between the `operators`, and of the
    keys and values that are kept, unless `cache` is another one.
    """

    precision: str
    linear: Storage
    embedding: Storage
    head: Storage
    quantizer: str = "rtn"
    accuracy_level: int = 4
    fuse_gate_up: bool = False
    logits: LogitsMode = "all"
    source_codes: Mapping[str, RowBlocks] = field(default_factory=dict)
    chosen: Mapping[str, RowBlocks] = field(default_factory=dict)
    quantized_here: int = 0
    swappable: tuple[str, ...] = ()
    activations: FloatName = "fp32"
    operators: Operators = field(default_factory=Operators)
    cache: CacheMode | None = None

    @property
    def cache_type(self) -> FloatName | CacheMode:
        """The type of the keys and values that are kept."""
        return self.cache or self.activations

    def storage_of(self, tensors: Sequence[str], otherwise: Storage) -> Storage:
        """Return the storage of the matrix made of the rows of `tensors`: that of the source's
        codes if they are kept, else the one chosen for it, else `otherwise`."""
        assert self.fit_together(tensors)
        return self._special(tensors[0]) or otherwise

    def keeps_codes(self, tensors: Sequence[str]) -> bool:
        """Return whether the matrix made of `tensors` keeps the source's codes."""
        return tensors[0] in self.source_codes

    def fit_together(self, tensors: Sequence[str]) -> bool:
        """Return whether the rows of `tensors` can be stored in one matrix: all in one way, and
        all with the source's codes or none."""
        return len({(self._special(name), name in self.source_codes) for name in tensors}) == 1

    def _special(self, tensor: str) -> RowBlocks | None:
        return self.source_codes.get(tensor) or self.chosen.get(tensor)

    def packs(self, projections: Sequence[str]) -> bool:
        """Return whether query, key and value `projections` share one matrix. The attention
        operator has to accept it, and all three must be stored in the same way."""
        operators = self.operators
        together = operators.packed_qkv and operators.fused_attention and not operators.standard
        return together and self.fit_together(projections)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values, for the manifest and the journal. Codes kept from the
        source are given as the number of tensors per kind of storage, and how many of them are in
        decoder layers; of those `chosen` each storage has its list of tensors."""
        kept = {
            name: (b.bits, b.block_size, bool(b.order)) for name, b in self.source_codes.items()
        }
        ways = Counter(kept.values())
        in_layers = Counter(way for name, way in kept.items() if name.startswith("model.layers."))
        counts = [
            {
                **dict(zip(("bits", "block_size", "reordered"), way, strict=True)),
                "tensors": count,
                "in_layers": in_layers[way],
            }
            for way, count in sorted(ways.items())
        ]
        values = asdict(replace(self, source_codes={}, chosen={}))
        del values["source_codes"]
        values["chosen"] = [
            {**way.to_json(), "tensors": [name for name, its in self.chosen.items() if its == way]}
            for way in dict.fromkeys(self.chosen.values())
        ]
        storages = {"linear": self.linear, "embedding": self.embedding, "head": self.head}
        values |= {name: storage.to_json() for name, storage in storages.items()}
        return {**values, "taken_over": counts}


def check_storages(recipe: Recipe, target: str) -> None:
    """Raise `UsageError` for a matrix that is stored in a way whose results were not measured on
    `target`: a provider may have a kernel for it that is wrong, or slow.

    Zero points of a quantized source are kept everywhere: its codes have no others.
    """
    for tensor, way in {**recipe.chosen, **recipe.source_codes}.items():
        what = _unmeasured(way, recipe.operators, kept=tensor in recipe.source_codes)
        if what:
            raise UsageError(
                f"the recipe stores {tensor} with {what}, which was not measured on the target "
                f"{target}: choose another storage for it, or the target cpu."
            )
        if way.bits == 2 and way.block_size not in TWO_BIT_BLOCKS:
            known = ", ".join(map(str, TWO_BIT_BLOCKS))
            raise UsageError(
                f"the recipe stores {tensor} with 2 bits in blocks of {way.block_size}, for which "
                f"ONNX Runtime has no fast kernel: use blocks of {known}."
            )


def _unmeasured(way: RowBlocks, operators: Operators, *, kept: bool) -> str:
    """Return what of `way` is not known to work; "" if all is. `kept`: its codes are the
    source's."""
    if way.bits == 2 and not operators.two_bits:
        return "2 bits"
    if way.zero_points and not (kept or operators.zero_points):
        return "zero points"
    folds = way.stored_scales == "plain" or operators.folded_scales
    return "" if folds else f"scales as {way.stored_scales}"


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
    calibrated: bool = False,
) -> Recipe:
    """Return the recipe, with defaults for `embedding` and `head` where they are None. `tied`:
    embedding and head are one matrix, stored once. `calibrated`: the quantizer chooses zero points
    and scales for the storage it is given, however small.

    Raises `UsageError` for an unknown precision or block size, for two storages of a tied matrix,
    or for an embedding that `operators` cannot read.
    """
    if tied and embedding and head and embedding != head:
        raise UsageError(
            f"the model ties embedding and head, so they cannot be stored as {embedding} and "
            f"{head}: pass only one of the two options."
        )
    if tied:
        embedding = head = embedding or head
    default = _default_embedding(precision, activations, operators)
    readable = readable_embeddings(operators)
    if embedding and embedding.startswith("int") and embedding not in readable:
        known = ", ".join(readable) or "fp32, fp16 or bf16"
        raise UsageError(
            f"the target has no operator that reads an {embedding} embedding: use {known}."
        )

    def stored(name: str, size: int = block_size, *, small: bool = calibrated) -> Storage:
        found = make_storage(name, size, scales=activations, columnwise=operators.standard)
        return small_storage(found, operators) if small else found

    # In 8 bits larger blocks lose next to nothing. The codes of a separate embedding of 4 bits are
    # rounded to nearest, without zero points.
    wide = max(block_size, EMBEDDING_BLOCK) if calibrated and embedding is None else block_size
    found = embedding or default
    embedded = stored(found, wide, small=calibrated and (tied or found == "int8"))
    return Recipe(
        precision=precision,
        quantizer=quantizer,
        linear=stored(precision),
        embedding=embedded,
        head=embedded if tied else stored(head or precision),
        accuracy_level=accuracy_level,
        fuse_gate_up=fuse_gate_up,
        logits=logits,
        activations=activations,
        operators=operators,
    )


def small_storage(storage: Storage, operators: Operators) -> Storage:
    """Return the smallest form of `storage` that loses no more and that `operators` read: zero
    points for codes of less than 8 bits, and scales of fewer bytes."""
    if not isinstance(storage, RowBlocks):
        return storage
    zero_points = operators.zero_points and storage.bits < 8
    folded = operators.folded_scales and storage.scales == "fp32"
    # A scale without zero points may be negative, which one of uint8 cannot be.
    form: ScaleForm = "plain" if not folded else "uint8" if zero_points else "fp16"
    return replace(storage, zero_points=zero_points, stored_scales=form)


def _default_embedding(precision: str, activations: FloatName, operators: Operators) -> str:
    """Return the default storage of the embedding. Only one row of it is read per token, so int8
    costs no speed. A separate head is read whole for every token, so it is stored like the other
    matrices."""
    if not precision.startswith("int"):
        return precision
    return "int8" if "int8" in readable_embeddings(operators) else activations


def readable_embeddings(operators: Operators) -> tuple[str, ...]:
    """Return the quantized types from which single rows can be read."""
    if operators.standard:
        return ("int8",)  # Gather has no 4-bit type
    return ("int8", "int4") if operators.gather_blocks else ()
