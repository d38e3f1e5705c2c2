"""Where the new tokens of a batch are: positions, padding, and the order that attention needs.

S new positions, T all of them. A mask [B, T] has a row of zeros and ones for each row of the batch;
its last S columns that are in use belong to the new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder


@dataclass(frozen=True)
class Places:
    """Indices of a batch's new tokens.

    `front` rotates a row so that its valid tokens come first, `back` is the inverse.
    """

    seqlens_k: ir.Value  # [B] int32: index of each row's last valid position
    front: ir.Value  # [B, S] int64 or int32: original index of position s of the rotated row
    back: ir.Value  # [B, S] int64: the inverse of `front`
    last: ir.Value  # [B, 1] int64: index of the last valid token in the rotated row
    position_ids: ir.Value | None = None  # [B, S] int64: of the rotated row


def shaped_places(
    op: OpBuilder, input_ids: ir.Value, mask: ir.Value, *, rotary: bool = True
) -> Places:
    """Compute with the shapes of `input_ids` [B, S] and `mask` [B, T], in 64 bits.

    Not `rotary`: without `position_ids`, for attention that applies the rotary embedding itself.
    """
    lengths = op.ReduceSum(mask, [1], keepdims=0)  # [B]
    size = op.Shape(input_ids, start=1, end=2)  # [1]
    new = op.Slice(mask, op.Neg(size), [2**31 - 1], [1])  # [B, S]
    padding = op.ArgMax(new, axis=1, keepdims=1)  # [B, 1] padding before the first token
    steps = op.Range(0, op.Squeeze(size, [0]), 1)  # [S]
    valid = op.ReduceSum(new, [1], keepdims=1)  # [B, 1]
    position_ids = None
    if rotary:
        position_ids = op.Add(op.Sub(op.Unsqueeze(lengths, [1]), valid), steps)
    return Places(
        seqlens_k=op.Cast(op.Sub(lengths, 1), to=ir.DataType.INT32),
        front=op.Mod(op.Add(steps, padding), size),
        back=op.Mod(op.Sub(op.Add(steps, size), padding), size),
        last=op.Sub(valid, 1),
        position_ids=position_ids,
    )


def counted_places(op: OpBuilder, input_ids: ir.Value, mask: ir.Value, context: int) -> Places:
    """Compute with kernels that DirectML has, and without a number on the CPU.

    A captured graph runs on the device alone, and gets a mask [B, T] of fixed length with zeros
    after the newest token. Everything is counted in 32 bits, because DirectML's Mod has no 64; a
    table turns the results into 64 bits, because its Cast of those does not compile on every
    device. `context` is the largest number of positions.
    """
    bits = _number(op, op.GreaterOrEqual(mask, 1))  # [B, T]
    ones = _number(op, op.GreaterOrEqual(input_ids, 0))  # [B, S], all 1
    columns = op.CumSum(_number(op, op.GreaterOrEqual(mask, 0)), 1)  # [B, T]: 1 to T
    size = op.ReduceSum(ones, [1], keepdims=1)  # [B, 1]: S
    steps = op.CumSum(ones, 1, exclusive=1)  # [B, S]: 0 to S - 1
    end = op.ReduceMax(op.Mul(columns, bits), keepdims=1)  # [1, 1]: columns in use
    new = op.GatherElements(bits, op.Add(op.Sub(end, size), steps), axis=1)  # [B, S]
    lengths = op.ReduceSum(bits, [1], keepdims=1)  # [B, 1]
    valid = op.ReduceSum(new, [1], keepdims=1)  # [B, 1]
    begun = _number(op, op.GreaterOrEqual(op.CumSum(new, 1), 1))  # 1 from the first valid token on
    padding = op.Sub(size, op.ReduceSum(begun, [1], keepdims=1))  # [B, 1]
    table = op.builder.initializer(ir.tensor(np.arange(context, dtype=np.int64), name="positions"))
    back = op.Mod(op.Sub(op.Add(steps, size), padding), size)
    position_ids = op.Add(op.Sub(lengths, valid), steps)
    return Places(
        seqlens_k=op.Squeeze(op.Sub(lengths, 1), [1]),
        front=op.Mod(op.Add(steps, padding), size),
        back=op.Gather(table, back),
        last=op.Gather(table, op.Sub(valid, 1)),
        position_ids=op.Gather(table, position_ids),
    )


def _number(op: OpBuilder, truth: ir.Value) -> ir.Value:
    return op.Cast(truth, to=ir.DataType.INT32)
