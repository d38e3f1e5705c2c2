"""The graph with standard ONNX operators only, opset 23, for any runtime that supports it.

Their contracts: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnxscript import OpBuilder

from llama_onnx.exporter.graph.operators import (
    Batch,
    KeyValue,
    Matrix,
    cast,
    rows_of,
    stamp,
    token_shape,
)
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.scales import SCALES
from llama_onnx.exporter.model.storage import QWEIGHT, WEIGHT


@dataclass(frozen=True)
class Masked:
    """The new positions of a batch. A mask hides padding; tokens keep their positions."""

    config: LlamaConfig
    position_ids: ir.Value  # [B, S] int64
    visible: ir.Value  # [B, 1, S, T] bool
    new: ir.Value  # [B, S] int64: the mask of the new positions
    tables: tuple[ir.Value, ...] = ()  # cos and sin, [max_position_embeddings, head_dim / 2]

    def arrange(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """Return `input_ids` unchanged."""
        return input_ids

    def restore(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Return `hidden` unchanged."""
        return hidden

    def last(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Return the hidden state of each row's last valid position, [B, 1, H]."""
        last = op.ArgMax(self.new, axis=1, keepdims=1, select_last_index=1)  # [B, 1]
        return op.GatherND(hidden, op.Unsqueeze(last, [2]), batch_dims=1)

    def with_tables(self, tables: tuple[ir.Value, ir.Value]) -> Batch:
        """Return a copy of the batch with `tables`."""
        return replace(self, tables=tables)

    def attend(
        self, op: OpBuilder, projected: tuple[ir.Value, ...], past: KeyValue
    ) -> tuple[ir.Value, KeyValue]:
        """Attention-23, which itself repeats keys and values for groups of queries; see `Batch`."""
        config = self.config
        query, key, value = projected
        out, present_key, present_value = op.Attention(
            self._rotate(op, query, config.num_attention_heads),
            self._rotate(op, key, config.num_key_value_heads),
            value,
            self.visible,
            past.key,
            past.value,
            q_num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            _outputs=3,
        )
        return stamp(out, *token_shape(config.q_size), like=query), KeyValue(
            present_key, present_value
        )

    def _rotate(self, op: OpBuilder, x: ir.Value, heads: int) -> ir.Value:
        """Apply rotary embeddings (Su et al., 2021) to x [B, S, heads head_dim]."""
        rotated = op.RotaryEmbedding(
            x, *self.tables, self.position_ids, interleaved=0, num_heads=heads
        )
        return stamp(rotated, *token_shape(heads * self.config.head_dim), like=x)


def masked(op: OpBuilder, config: LlamaConfig, input_ids: ir.Value, mask: ir.Value) -> Masked:
    """Return the batch: valid tokens are counted for positions, and each token attends to the
    valid tokens up to itself.

    A sliding window is counted in valid tokens. A padding token attends to itself too: an empty
    softmax row would be NaN, which would spread through the cache to every token.
    """
    size = op.Shape(input_ids, start=1, end=2)  # [1]
    total = op.Shape(mask, start=1, end=2)  # [1]
    counted = op.Sub(op.CumSum(mask, 1), 1)  # [B, T]
    positions = op.Max(op.Slice(counted, op.Neg(size), [2**31 - 1], [1]), 0)  # [B, S]
    new = op.Slice(mask, op.Neg(size), [2**31 - 1], [1])  # [B, S]
    keys = op.Range(0, op.Squeeze(total, [0]), 1)  # [T]
    queries = op.Unsqueeze(op.Slice(keys, op.Neg(size), [2**31 - 1], [0]), [1])  # [S, 1]
    valid = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), [1, 2])  # [B, 1, 1, T]
    earlier, itself = op.LessOrEqual(keys, queries), op.Equal(keys, queries)  # [S, T]
    if config.window is not None:
        oldest = op.Sub(op.Unsqueeze(positions, [1, 3]), config.window - 1)  # [B, 1, S, 1]
        recent = op.LessOrEqual(oldest, op.Unsqueeze(counted, [1, 2]))  # [B, 1, S, T]
        valid = op.And(valid, recent)
    visible = op.Or(op.And(valid, earlier), itself)  # [B, 1, S, T]
    return Masked(config, positions, visible, new)


@dataclass(frozen=True)
class Standard:
    """The `Dialect` of standard ONNX operators."""

    @property
    def domains(self) -> Mapping[str, int]:
        """None besides ONNX's own."""
        return {}

    def batch(
        self,
        op: OpBuilder,
        config: LlamaConfig,
        input_ids: ir.Value,
        mask: ir.Value,
    ) -> Batch:
        """Return the batch; see `masked`."""
        return masked(op, config, input_ids, mask)

    def gather(self, op: OpBuilder, matrix: Matrix, ids: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return rows of the embedding. A quantized one is stored as a tied head reads it, by
        columns: the tokens' columns are gathered, dequantized, then transposed."""
        stored, width = matrix.slot.storage.codes, matrix.slot.shape[1]
        if stored is None:
            found = op.Gather(matrix.values[WEIGHT], ids, axis=0)
            return stamp(cast(op, found, dtype), *token_shape(width), dtype=dtype)
        codes = op.Gather(matrix.values[QWEIGHT], ids, axis=1)  # [H, B, S]
        scales = op.Gather(matrix.values[SCALES], ids, axis=1)  # [blocks, B, S]
        columns = op.DequantizeLinear(codes, scales, axis=0, block_size=stored.block_size)
        return stamp(op.Transpose(columns, perm=[1, 2, 0]), *token_shape(width), dtype=dtype)

    def matmul(self, op: OpBuilder, x: ir.Value, matrix: Matrix) -> ir.Value:
        """Return x @ W.T. ONNX Runtime fuses either pair of nodes into one operator."""
        codes = matrix.slot.storage.codes
        if codes is not None:
            weight = op.DequantizeLinear(
                matrix.values[QWEIGHT],
                matrix.values[SCALES],
                axis=0,
                block_size=codes.block_size,
            )
        else:
            assert x.dtype is not None
            weight = op.Transpose(cast(op, matrix.values[WEIGHT], x.dtype), perm=[1, 0])
        return stamp(op.MatMul(x, weight), *token_shape(matrix.slot.shape[0]), like=x)

    def low_rank(self, op: OpBuilder, x: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return x @ A.T @ B.T."""
        for matrix in (a, b):
            product = op.MatMul(x, op.Transpose(matrix, perm=[1, 0]))
            x = stamp(product, *token_shape(rows_of(matrix)), like=x)
        return x

    def rms_norm(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None, gain: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """Return the results of RMSNormalization-23 and of the Add before it."""
        assert gain.shape is not None
        shape = token_shape(gain.shape[0])  # type: ignore[arg-type]
        total = x if residual is None else stamp(op.Add(x, residual), *shape, like=x)
        normed = op.RMSNormalization(total, gain, axis=-1, epsilon=eps)
        return stamp(normed, *shape, like=x), total

    def silu(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return x * sigmoid(x); Swish needs opset 24."""
        assert x.shape is not None
        return stamp(op.Mul(x, op.Sigmoid(x)), *x.shape, like=x)
