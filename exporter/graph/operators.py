"""The interface between layers and operators, and helpers that set types and shapes of values.

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
    """A slot with its initializers as values of the graph, keyed by the last part of their names:
    `weight`, or `qweight`, `scales` and, if its storage has them, `row_scales`, `zero_points` and
    `order`."""

    slot: Slot
    values: Mapping[str, ir.Value]


class Batch(Protocol):
    """The new positions of a batch, with what the operators need to handle padding and the past."""

    def arrange(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """Return token ids [B, S] in the order that the layers need."""

    def restore(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Return hidden states [B, S, H] in the original order of their tokens."""

    def last(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Return the hidden state of each row's last valid position, [B, 1, H]."""

    def with_tables(self, tables: tuple[ir.Value, ir.Value]) -> Batch:
        """Return a copy whose attention uses the rotary tables cos and sin,
        [max_position_embeddings, head_dim/2] each."""

    def attend(
        self, op: OpBuilder, projected: tuple[ir.Value, ...], past: KeyValue
    ) -> tuple[ir.Value, KeyValue]:
        """Compute causal attention with rotary embeddings and a cache.

        `projected` is query [B, S, num_attention_heads head_dim], key and value, or all three in
        one matrix. Returns [B, S, num_attention_heads head_dim], and the cache with the new keys
        and values appended.
        """


class Dialect(Protocol):
    """The set of operators of a graph."""

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
        """Return the batch of `input_ids` [B, S] under `mask` [B, T]."""

    def gather(self, op: OpBuilder, matrix: Matrix, ids: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the rows [B, S, in_features] of `matrix` for token ids [B, S], as `dtype`."""

    def matmul(self, op: OpBuilder, x: ir.Value, matrix: Matrix) -> ir.Value:
        """Return x @ W.T [B, S, out_features] for x [B, S, in_features]."""

    def low_rank(self, op: OpBuilder, x: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return x @ A.T @ B.T [B, S, out_features] for x [B, S, in_features] and floats
        A [rank, in_features] and B [out_features, rank]."""

    def rms_norm(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None, gain: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """Return the norm of x + residual, and x + residual, both [B, S, H]."""

    def silu(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return x * sigmoid(x)."""


def stamp(
    value: ir.Value,
    *shape: int | str | None,
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Set the shape of `value` and its type to `dtype` or that of `like`, and return it.

    The builder cannot infer them after an operator of ONNX Runtime's."""
    found = dtype or (like.dtype if like is not None else None)
    assert found is not None, "one of the two is given"
    value.type = ir.TensorType(found)
    value.shape = ir.Shape(shape)
    return value


def token_shape(*channels: int | str) -> tuple[int | str, ...]:
    """Return the shape [B, S, *channels] of a value with one entry per new token."""
    return ("batch_size", "sequence_length", *channels)


def rows_of(matrix: ir.Value) -> int | str:
    """Return the number of rows of a graph value, or the name of its dimension if it is dynamic."""
    assert matrix.shape is not None
    size = matrix.shape[0]
    return size if isinstance(size, int) else str(size)


def cast(op: OpBuilder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return `value` as `dtype`. ONNX Runtime folds the cast of a weight at load time."""
    return value if value.dtype == dtype else op.Cast(value, to=dtype)
