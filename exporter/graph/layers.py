"""Layers that hold weights, on ONNX Runtime's fused operators.

Shapes: B batch, S new positions, T past and new positions, H hidden_size, V vocab_size.
Operator contracts: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.quantize.recipe import Blocks, Float, Recipe, Storage

MICROSOFT = "com.microsoft"


def stamp(value: ir.Value, *shape: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """Write dtype and shape on `value`: behind a contrib operator the builder cannot infer them."""
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(shape)
    return value


class Weighted(nn.Module):
    """A module whose parameters are the initializers of one slot: `weight`, or `qweight`, `scales`
    and, if its storage has them, `zero_points` and `order`."""

    weight: nn.Parameter
    qweight: nn.Parameter
    scales: nn.Parameter
    zero_points: nn.Parameter | None = None
    order: nn.Parameter | None = None

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot
        for initializer in slot.initializers():
            attribute = initializer.name.rsplit(".", 1)[1]
            setattr(self, attribute, nn.Parameter(initializer.shape, initializer.dtype))


class RMSNorm(Weighted):
    """y = x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, 2019), residual add in front."""

    def __init__(self, name: str, hidden_size: int, eps: float) -> None:
        super().__init__(Slot(name, (f"{name}.weight",), (hidden_size,), Float(32)))
        self.eps = eps

    def forward(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return (normalized x + residual, x + residual), both [B, S, H]."""
        shape = ("batch_size", "sequence_length", self.slot.shape[0])
        if residual is None:
            normed = op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.eps)
            return stamp(normed, *shape), x
        # ONNX Runtime does not fuse Add + RMSNormalization by itself at any optimization level.
        normed, _, _, total = op.SkipSimplifiedLayerNormalization(
            x, residual, self.weight, epsilon=self.eps, _domain=MICROSOFT, _outputs=4
        )
        return stamp(normed, *shape), stamp(total, *shape)


class Linear(Weighted):
    """x @ W.T with W [out_features, in_features], whatever W is stored as; plus the low-rank
    product of the active adapter, where the recipe makes the matrix swappable."""

    def __init__(
        self,
        name: str,
        rows: int,
        columns: int,
        recipe: Recipe,
        packed: Mapping[str, int] | None = None,
        storage: Storage | None = None,
    ) -> None:
        """`packed`: the projections whose rows stand one after the other, when more than one, with
        the number of rows of each."""
        self.parts = packed or {name: rows}
        sources = tuple(f"{part}.weight" for part in self.parts)
        stored = recipe.storage_of(sources, storage or recipe.linear)
        super().__init__(Slot(name, sources, (rows, columns), stored))
        self.accuracy_level = recipe.accuracy_level
        kinds = {part.rpartition(".")[2] for part in self.parts}
        self.swappable = not kinds.isdisjoint(recipe.swappable)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[B, S, in_features] -> [B, S, out_features]."""
        if isinstance(self.slot.storage, Float):
            y = float_matmul(op, x, self.weight, self.slot)
        else:
            y = blocks_matmul(
                op,
                x,
                self.qweight,
                self.scales,
                self.slot,
                self.accuracy_level,
                self.zero_points,
                self.order,
            )
        return self._plus_adapter(op, x, y) if self.swappable else y

    def _plus_adapter(self, op: OpBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        columns = self.slot.shape[1]
        changes = [low_rank(op, x, part, rows, columns) for part, rows in self.parts.items()]
        change = changes[0] if len(changes) == 1 else op.Concat(*changes, axis=-1)
        total = op.Add(y, stamp(change, "batch_size", "sequence_length", self.slot.shape[0]))
        return stamp(total, "batch_size", "sequence_length", self.slot.shape[0])


class Embedding(Weighted):
    """Rows of the embedding matrix by token id."""

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """[B, S] int64 -> [B, S, H] float32."""
        hidden_size = self.slot.shape[1]
        shape = ("batch_size", "sequence_length", hidden_size)
        if isinstance(self.slot.storage, Float):
            hidden = op.Gather(self.weight, input_ids, axis=0)
            return stamp(_as_float32(op, hidden, self.slot.storage), *shape)
        return stamp(self._gather_blocks(op, input_ids, self.slot.storage), *shape)

    def _gather_blocks(self, op: OpBuilder, input_ids: ir.Value, storage: Blocks) -> ir.Value:
        hidden_size = self.slot.shape[1]
        hidden = op.GatherBlockQuantized(
            self.qweight,
            input_ids,
            self.scales,
            bits=storage.bits,
            block_size=storage.block_size,
            gather_axis=0,
            quantize_axis=1,
            _domain=MICROSOFT,
        )
        if hidden_size % storage.block_size:  # the last block's padding is no channel
            hidden = op.Slice(stamp(hidden, "batch_size", "sequence_length", "padded"),
                              [0], [hidden_size], [2])  # fmt: skip
        return hidden


class TiedHead(nn.Module):
    """The head of a model that ties it to the embedding: the same bytes, read as a matrix.

    `GatherBlockQuantized` wants its codes [V, bytes] and `MatMulNBits` [V, blocks, bytes]; both
    initializers point at the same place in the data file, so the file holds them once.
    """

    def __init__(self, embedding: Embedding, accuracy_level: int) -> None:
        super().__init__()
        self.slot, self.accuracy_level = embedding.slot, accuracy_level
        self.shared = (embedding,)  # in a tuple, lest it be registered as a child of the head
        if isinstance(self.slot.storage, Blocks):
            codes = replace(self.slot, gathered=False).initializers()[0]
            self.qweight = nn.Parameter(codes.shape, codes.dtype)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[B, S, H] -> [B, S, V]."""
        (embedding,) = self.shared
        if isinstance(self.slot.storage, Float):
            return float_matmul(op, x, embedding.weight, self.slot)
        return blocks_matmul(op, x, self.qweight, embedding.scales, self.slot, self.accuracy_level)


def float_matmul(op: OpBuilder, x: ir.Value, weight: ir.Value, slot: Slot) -> ir.Value:
    """x @ weight.T for a float weight [N, K]: no transposed copy, neither on disk nor in memory."""
    out = op.FusedMatMul(x, _as_float32(op, weight, slot.storage), transB=1, _domain=MICROSOFT)
    return stamp(out, "batch_size", "sequence_length", slot.shape[0])


def blocks_matmul(
    op: OpBuilder,
    x: ir.Value,
    qweight: ir.Value,
    scales: ir.Value,
    slot: Slot,
    accuracy_level: int,
    zero_points: ir.Value | None = None,
    order: ir.Value | None = None,
) -> ir.Value:
    """x @ dequantized(qweight, scales, zero_points).T by `MatMulNBits`; symmetric without zero
    points. `order` [K] is the channel of x that each column of the codes belongs to."""
    assert isinstance(slot.storage, Blocks)
    if order is not None:
        # The operator's own g_idx is over a hundred times slower, and wrong with zero points.
        x = stamp(op.Gather(x, order, axis=-1), "batch_size", "sequence_length", slot.shape[1])
    out = op.MatMulNBits(
        x,
        qweight,
        scales,
        *([] if zero_points is None else [zero_points]),
        N=slot.shape[0],
        K=slot.shape[1],
        bits=slot.storage.bits,
        block_size=slot.storage.block_size,
        accuracy_level=accuracy_level,
        _domain=MICROSOFT,
    )
    return stamp(out, "batch_size", "sequence_length", slot.shape[0])


def low_rank(op: OpBuilder, x: ir.Value, module: str, rows: int, columns: int) -> ir.Value:
    """x @ A.T @ B.T with A [rank, columns] and B [rows, rank], the active adapter's change of
    `module`.

    A and B are inputs of the graph, under PEFT's own names, that need not be given: they have rank
    0 then, and the product is zero. Each matrix has a rank of its own.
    """
    rank = f"{module}.rank"
    a = _optional_input(op, f"{module}.lora_A.weight", rank, columns)
    b = _optional_input(op, f"{module}.lora_B.weight", rows, rank)
    down = op.FusedMatMul(x, a, transB=1, _domain=MICROSOFT)
    stamp(down, "batch_size", "sequence_length", rank)
    up = op.FusedMatMul(down, b, transB=1, _domain=MICROSOFT)
    return stamp(up, "batch_size", "sequence_length", rows)


def _optional_input(op: OpBuilder, name: str, *shape: int | str) -> ir.Value:
    nothing = np.zeros([0 if isinstance(size, str) else size for size in shape], np.float32)
    return stamp(op.builder.input(name, const_value=ir.tensor(nothing)), *shape)


def _as_float32(op: OpBuilder, value: ir.Value, storage: Storage) -> ir.Value:
    if storage == Float(32):
        return value
    # ONNX Runtime folds the cast of a weight when it loads; CPUs have no faster half arithmetic.
    return op.Cast(value, to=ir.DataType.FLOAT)
