"""Layers that hold weights, independent of the set of operators.

Shapes: B batch, S new positions, T past and new positions, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder, nn

from llama_onnx.exporter.graph.operators import Dialect, Matrix, stamp, token_shape
from llama_onnx.exporter.graph.slots import Initializer, Slot
from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.exporter.model.storage import Floats, Storage
from llama_onnx.targets.graph_names import LORA_A, LORA_B, adapter_name


class Weighted(nn.Module):
    """A module whose parameters are the initializers of one slot: `weight`, or `qweight`, `scales`
    and, if its storage has them, `row_scales`, `zero_points` and `order`."""

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.slot = slot
        for initializer in slot.initializers():
            setattr(self, initializer.part, _parameter(initializer))

    @property
    def matrix(self) -> Matrix:
        """The slot with its initializers as values."""
        names = [initializer.part for initializer in self.slot.initializers()]
        return Matrix(self.slot, {name: getattr(self, name) for name in names})


class RMSNorm(Weighted):
    """y = x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich, 2019), after the residual add."""

    weight: nn.Parameter

    def __init__(
        self, name: str, hidden_size: int, eps: float, recipe: Recipe, dialect: Dialect
    ) -> None:
        gain = Slot(name, (f"{name}.weight",), (hidden_size,), Floats(recipe.activations))
        super().__init__(gain)
        self.eps, self.dialect = eps, dialect

    def forward(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return (normalized x + residual, x + residual), both [B, S, H]."""
        return self.dialect.rms_norm(op, x, residual, self.weight, self.eps)


class Linear(Weighted):
    """x @ W.T with W [out_features, in_features] in any storage, plus the low-rank product of the
    active adapter if the recipe makes the matrix swappable."""

    def __init__(
        self,
        name: str,
        rows: int,
        columns: int,
        recipe: Recipe,
        dialect: Dialect,
        packed: Mapping[str, int] | None = None,
        storage: Storage | None = None,
    ) -> None:
        """`packed`: if the matrix holds several projections, the number of rows of each by name,
        in order."""
        self.parts = packed or {name: rows}
        sources = tuple(f"{part}.weight" for part in self.parts)
        stored = recipe.storage_of(sources, storage or recipe.linear)
        keeps = recipe.keeps_codes(sources)
        super().__init__(Slot(name, sources, (rows, columns), stored, keeps_codes=keeps))
        self.dialect = dialect
        kinds = {part.rpartition(".")[2] for part in self.parts}
        self.swappable = not kinds.isdisjoint(recipe.swappable)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return y [B, S, out_features] for x [B, S, in_features]."""
        y = self.dialect.matmul(op, x, self.matrix)
        return self._plus_adapter(op, x, y) if self.swappable else y

    def _plus_adapter(self, op: OpBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        rows, columns = self.slot.shape
        changes = []
        for part, size in self.parts.items():
            a, b = _adapter_inputs(op, part, size, columns)
            changes.append(self.dialect.low_rank(op, x, a, b))
        change = changes[0] if len(changes) == 1 else op.Concat(*changes, axis=-1)
        total = op.Add(y, stamp(change, *token_shape(rows), like=x))
        return stamp(total, *token_shape(rows), like=x)


class Embedding(Weighted):
    """The rows of the embedding matrix, looked up by token id."""

    def __init__(self, slot: Slot, dialect: Dialect, dtype: ir.DataType) -> None:
        super().__init__(slot)
        self.dialect, self.dtype = dialect, dtype

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """Return the embeddings [B, S, H] of token ids [B, S] int64."""
        return self.dialect.gather(op, self.matrix, input_ids, self.dtype)


class TiedHead(nn.Module):
    """The head of a model with tied embeddings: the embedding's bytes, read as a matrix.

    If quantized, it has separate initializers that point at the embedding's bytes in the data file,
    which holds them once. They are needed because `GatherBlockQuantized` reads codes [V, bytes] and
    `MatMulNBits` [V, blocks, bytes], and because ONNX Runtime fuses a DequantizeLinear with a
    MatMul only if no other node reads its inputs.
    """

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        self.slot = replace(embedding.slot, gathered=False)
        self.shared = (embedding,)  # a tuple, so that it is not registered as a child of the head
        self.own = self.slot.storage.unshared
        for initializer in self.slot.initializers():
            if initializer.part in self.own:
                setattr(self, initializer.part, _parameter(initializer))

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return the logits [B, S, V] of hidden states [B, S, H]."""
        (embedding,) = self.shared
        own = {name: getattr(self, name) for name in self.own}
        values = {**embedding.matrix.values, **own}
        return embedding.dialect.matmul(op, x, Matrix(self.slot, values))


def _adapter_inputs(
    op: OpBuilder, module: str, rows: int, columns: int
) -> tuple[ir.Value, ir.Value]:
    """Return A [rank, columns] and B [rows, rank], the active adapter's change of `module`.

    They are optional inputs of the graph, named as in PEFT. By default they have rank 0, so that
    their product is zero. The rank may differ from matrix to matrix.
    """
    rank = f"{module}.rank"
    a = _optional_input(op, adapter_name(module, LORA_A), rank, columns)
    b = _optional_input(op, adapter_name(module, LORA_B), rows, rank)
    return a, b


def _optional_input(op: OpBuilder, name: str, *shape: int | str) -> ir.Value:
    nothing = np.zeros([0 if isinstance(size, str) else size for size in shape], np.float32)
    given = op.builder.input(name, const_value=ir.tensor(nothing))
    return stamp(given, *shape, dtype=ir.DataType.FLOAT)


def _parameter(initializer: Initializer) -> nn.Parameter:
    return nn.Parameter(initializer.shape, initializer.dtype)
