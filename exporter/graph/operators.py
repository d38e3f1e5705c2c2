"""What the layers need of a set of operators, and how values get their types and shapes.

Shapes: B batch, S new positions, T past and new positions, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
from onnxscript import OpBuilder

from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.model.config import LlamaConfig


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer, each [B, num_key_value_heads, T, head_dim]."""

    key: ir.Value
    value: ir.Value


@dataclass(frozen=True)
class Matrix:
    """A slot with its initializers as values of the graph, by the last part of their names:
    `weight`, or `qweight`, `scales` and, if its storage has them, `zero_points` and `order`."""

    slot: Slot
    values: Mapping[str, ir.Value]


class Batch(Protocol):
    """The new positions of a batch: what the operators know of padding and of the past."""

    def arrange(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """Token ids [B, S] in the order in which the layers want them."""

    def restore(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Hidden states [B, S, H] back where their tokens were."""

    def last(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Hidden state of each row's last valid position, [B, 1, H]."""

    def rotating(self, tables: tuple[ir.Value, ir.Value]) -> Batch:
        """The same, whose attention rotates by cos and sin, [max_position_embeddings, head_dim/2]
        each."""

    def attend(
        self, op: OpBuilder, projected: tuple[ir.Value, ...], past: KeyValue
    ) -> tuple[ir.Value, KeyValue]:
        """Rotated, cached, causal attention.

        `projected`: query [B, S, num_attention_heads head_dim], key and value; or all three in one.
        Returns [B, S, num_attention_heads head_dim], and keys and values with the new ones.
        """


class Dialect(Protocol):
    """The operators a graph is made of."""

    @property
    def domains(self) -> Mapping[str, int]:
        """Operator sets it needs besides ONNX's own: domain -> version."""
        ...

    def batch(
        self,
        op: OpBuilder,
        config: LlamaConfig,
        input_ids: ir.Value,
        mask: ir.Value,
    ) -> Batch:
        """The batch of `input_ids` [B, S] under `mask` [B, T]."""

    def gather(self, op: OpBuilder, matrix: Matrix, ids: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Rows [B, S, in_features] of `matrix` by token id [B, S], as `dtype`."""

    def matmul(self, op: OpBuilder, x: ir.Value, matrix: Matrix) -> ir.Value:
        """x @ W.T, [B, S, in_features] -> [B, S, out_features]."""

    def low_rank(self, op: OpBuilder, x: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """x @ A.T @ B.T with floats A [rank, in_features] and B [out_features, rank],
        [B, S, in_features] -> [B, S, out_features]."""

    def rms_norm(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None, gain: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """The norm of x + residual, and x + residual, both [B, S, H]."""

    def silu(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """x * sigmoid(x)."""


def stamp(
    value: ir.Value,
    *shape: int | str | None,
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Write shape and dtype (that of `like`) on `value`: after a contrib operator the builder
    cannot infer them."""
    found = dtype or (like.dtype if like is not None else None)
    assert found is not None, "one of the two is given"
    value.type = ir.TensorType(found)
    value.shape = ir.Shape(shape)
    return value


def tokens(*channels: int | str) -> tuple[int | str, ...]:
    """Return the shape [B, S, ...] of a value for every new token."""
    return ("batch_size", "sequence_length", *channels)


def rows_of(matrix: ir.Value) -> int | str:
    """Return the first size of a matrix of the graph: a number, or the name of an unknown one."""
    assert matrix.shape is not None
    size = matrix.shape[0]
    return size if isinstance(size, int) else str(size)


def cast(op: OpBuilder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` as `dtype`. ONNX Runtime folds the cast of a weight when it loads."""
    return value if value.dtype == dtype else op.Cast(value, to=dtype)
