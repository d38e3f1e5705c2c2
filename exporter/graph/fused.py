"""The graph with ONNX Runtime's own operators, domain `com.microsoft`.

Their contracts: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from llama_onnx.exporter.formats.tensor import BlockCodes
from llama_onnx.exporter.graph.operators import (
    Batch,
    KeyValue,
    Matrix,
    cast,
    rows_of,
    stamp,
    token_shape,
)
from llama_onnx.exporter.graph.positions import Places, counted_places, shaped_places
from llama_onnx.exporter.graph.standard import masked
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.scales import ROW_SCALES, SCALES
from llama_onnx.exporter.model.storage import ORDER, QWEIGHT, WEIGHT, ZERO_POINTS
from llama_onnx.targets.target import Operators

MICROSOFT = "com.microsoft"

INT8_CACHE = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
"""The attributes of GroupQueryAttention with a cache of int8, a scale for each channel."""

EMPTY_SINK = -30000.0
"""The logit of a sink that takes no attention, exact in half precision: exp(-30000 - m) is 0 for
the largest score m of a row."""


@dataclass(frozen=True)
class Window:
    """The new positions of a batch, with the padding of each row computed.

    GroupQueryAttention needs each row's valid positions first (right padding, as in genai), but
    most Python code pads on the left. Rows padded on the left are therefore rotated on the way in
    and rotated back on the way out. This moves only token ids and hidden states, both small, and
    avoids a mask [B, S, T] in every layer.
    """

    config: LlamaConfig
    operators: Operators
    total_sequence_length: ir.Value  # scalar int32: T
    places: Places
    tables: tuple[ir.Value, ...] = ()  # cos and sin, [max_position_embeddings, head_dim / 2]

    def arrange(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """Return token ids [B, S] rotated so that valid ones come first."""
        return op.GatherElements(input_ids, self.places.front, axis=1)

    def restore(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Return hidden states [B, S, H] rotated back to the original order of the tokens."""
        return op.GatherND(hidden, op.Unsqueeze(self.places.back, [2]), batch_dims=1)

    def last(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Return the hidden state of each row's last valid position, [B, 1, H]."""
        index = op.Unsqueeze(self.places.last, [2])  # [B, 1, 1]
        return op.GatherND(hidden, index, batch_dims=1)

    def with_tables(self, tables: tuple[ir.Value, ir.Value]) -> Batch:
        """Return a copy of the batch with `tables`."""
        return replace(self, tables=tables)

    def attend(
        self,
        op: OpBuilder,
        projected: tuple[ir.Value, ...],
        past: KeyValue,
        scales: KeyValue | None = None,
    ) -> tuple[ir.Value, KeyValue]:
        """Grouped-query attention (Ainslie et al., 2023); see `Batch`."""
        config, inner = self.config, self.operators.inner_rotary
        query, key, value = projected if len(projected) == 3 else (projected[0], None, None)
        if not inner:
            assert key is not None, "a packed matrix cannot be rotated outside the attention"
            query, key = self._rotate(op, query), self._rotate(op, key)
        out, present_key, present_value = op.GroupQueryAttention(
            query,
            key,
            value,
            past.key,
            past.value,
            self.places.seqlens_k,
            self.total_sequence_length,
            *self._optional_inputs(op, query, scales),
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=int(inner),
            rotary_interleaved=0,
            **({"local_window_size": config.window} if config.window else {}),
            **(INT8_CACHE if scales is not None else {}),
            **({"smooth_softmax": 1} if self.operators.empty_sink else {}),
            _domain=MICROSOFT,
            _outputs=3,
        )
        stamp(out, *token_shape(config.q_size), like=projected[0])
        return out, KeyValue(present_key, present_value)

    def _optional_inputs(
        self, op: OpBuilder, query: ir.Value, scales: KeyValue | None
    ) -> list[ir.Value | None]:
        """Return the last inputs of GroupQueryAttention: tables, a sink for each head, scales."""
        inputs: list[ir.Value | None] = [None] * 7
        if self.operators.inner_rotary:
            inputs[:2] = self.tables
        if self.operators.empty_sink:
            assert query.dtype is not None
            sink = np.full(self.config.num_attention_heads, EMPTY_SINK, query.dtype.numpy())
            inputs[4] = op.initializer(ir.tensor(sink), "sink")
        if scales is not None:
            inputs[5:] = scales.key, scales.value
        while inputs and inputs[-1] is None:
            inputs.pop()
        return inputs

    def _rotate(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Apply rotary embeddings (Su et al., 2021) to x [B, S, heads head_dim]."""
        assert x.shape is not None
        rotated = op.RotaryEmbedding(
            x, self.places.position_ids, *self.tables, interleaved=0, _domain=MICROSOFT
        )
        return stamp(rotated, *x.shape, like=x)


@dataclass(frozen=True)
class Fused:
    """The `Dialect` of ONNX Runtime's operators. `accuracy_level` is that of MatMulNBits."""

    operators: Operators
    accuracy_level: int

    @property
    def domains(self) -> Mapping[str, int]:
        """ONNX Runtime's domain."""
        return {MICROSOFT: 1}

    def batch(
        self,
        op: OpBuilder,
        config: LlamaConfig,
        input_ids: ir.Value,
        mask: ir.Value,
    ) -> Batch:
        """Return the window of `input_ids` [B, S] under `mask` [B, T], or what ONNX's Attention
        needs."""
        if not self.operators.fused_attention:
            return masked(op, config, input_ids, mask)
        total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2), [0]), to=ir.DataType.INT32)
        if self.operators.counted_positions:
            places = counted_places(op, input_ids, mask, config.max_position_embeddings)
        else:
            rotary = not self.operators.inner_rotary
            places = shaped_places(op, input_ids, mask, rotary=rotary)
        return Window(config, self.operators, total, places)

    def gather(self, op: OpBuilder, matrix: Matrix, ids: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return rows of `matrix` by token id, using `GatherBlockQuantized` if it is quantized."""
        codes, width = matrix.slot.storage.codes, matrix.slot.shape[1]
        values = matrix.values
        if codes is None:
            found = op.Gather(values[WEIGHT], ids, axis=0)
            return stamp(cast(op, found, dtype), *token_shape(width), dtype=dtype)
        hidden = op.GatherBlockQuantized(
            values[QWEIGHT],
            ids,
            _scales(op, values, dtype),
            *_zero_points(values),
            bits=codes.bits,
            block_size=codes.block_size,
            gather_axis=0,
            quantize_axis=1,
            _domain=MICROSOFT,
        )
        if width % codes.block_size:  # cut off the padding of the last block
            hidden = op.Slice(stamp(hidden, *token_shape("padded"), dtype=dtype), [0], [width], [2])
        return stamp(hidden, *token_shape(width), dtype=dtype)

    def matmul(self, op: OpBuilder, x: ir.Value, matrix: Matrix) -> ir.Value:
        """Return x @ W.T. A float W [N, K] needs no transposed copy on disk or in memory."""
        codes = matrix.slot.storage.codes
        if codes is not None:
            out = self._matmul_blocks(op, x, matrix, codes)
        else:
            assert x.dtype is not None
            out = self._times(op, x, cast(op, matrix.values[WEIGHT], x.dtype))
        return stamp(out, *token_shape(matrix.slot.shape[0]), like=x)

    def low_rank(self, op: OpBuilder, x: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Return x @ A.T @ B.T."""
        down = stamp(self._times(op, x, a), *token_shape(rows_of(a)), like=x)
        return stamp(self._times(op, down, b), *token_shape(rows_of(b)), like=x)

    def _times(self, op: OpBuilder, x: ir.Value, weight: ir.Value) -> ir.Value:
        """Return x @ W.T for floats W [N, K]."""
        if self.operators.fused_matmul:
            return op.FusedMatMul(x, weight, transB=1, _domain=MICROSOFT)
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def _matmul_blocks(
        self, op: OpBuilder, x: ir.Value, matrix: Matrix, codes: BlockCodes
    ) -> ir.Value:
        """Return x @ W.T for codes, symmetric if they have no zero points. The part `order` [K] is
        the channel of x for each column of the codes."""
        rows, columns = matrix.slot.shape
        values = matrix.values
        if ORDER in values:
            # The operator's g_idx input is over 100 times slower, and wrong with zero points.
            x = stamp(op.Gather(x, values[ORDER], axis=-1), *token_shape(columns), like=x)
        assert x.dtype is not None
        return op.MatMulNBits(
            x,
            values[QWEIGHT],
            _scales(op, values, x.dtype),
            *_zero_points(values),
            N=rows,
            K=columns,
            bits=codes.bits,
            block_size=codes.block_size,
            accuracy_level=self.accuracy_level,
            _domain=MICROSOFT,
        )

    def rms_norm(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None, gain: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """Use the fused operator: no optimization level of ONNX Runtime fuses an Add and a norm."""
        assert gain.shape is not None
        shape = token_shape(gain.shape[0])  # type: ignore[arg-type]
        if self.operators.wide_norms:
            return self._wide_norm(op, x, residual, gain, eps)
        if residual is not None:
            normed, *unused, total = op.SkipSimplifiedLayerNormalization(
                x, residual, gain, epsilon=eps, _domain=MICROSOFT, _outputs=4
            )
            for value in unused:  # DirectML has no kernel for a node that has these outputs
                value.name = ""
            return stamp(normed, *shape, like=x), stamp(total, *shape, like=x)
        if self.operators.rms_normalization:
            normed = op.RMSNormalization(x, gain, axis=-1, epsilon=eps)
        else:  # ONNX Runtime's own operator, although it is in ONNX's domain
            normed = op.SimplifiedLayerNormalization(x, gain, axis=-1, epsilon=eps, stash_type=1)
        return stamp(normed, *shape, like=x), x

    def _wide_norm(
        self, op: OpBuilder, x: ir.Value, residual: ir.Value | None, gain: ir.Value, eps: float
    ) -> tuple[ir.Value, ir.Value]:
        """Return what `rms_norm` returns, with the squares added up in float32."""
        assert x.shape is not None
        total = x if residual is None else stamp(op.Add(x, residual), *x.shape, like=x)
        wide = cast(op, total, ir.DataType.FLOAT)
        normed = op.SimplifiedLayerNormalization(wide, gain, axis=-1, epsilon=eps, stash_type=1)
        return stamp(normed, *x.shape, like=x), total

    def silu(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return x * sigmoid(x), which QuickGelu with alpha=1 computes in one operator."""
        assert x.shape is not None
        return stamp(op.QuickGelu(x, alpha=1.0, _domain=MICROSOFT), *x.shape, like=x)


def _scales(op: OpBuilder, values: Mapping[str, ir.Value], dtype: ir.DataType) -> ir.Value:
    """Return the scales of a matrix as `dtype`, whichever form the file has them in.

    ONNX Runtime computes them once, when it opens the package. Each operator has nodes of its own,
    in its own module, so that a graph can be cut between the modules.
    """
    scales = cast(op, values[SCALES], dtype)
    if ROW_SCALES in values:
        shape = scales.shape
        scales = op.Mul(scales, cast(op, values[ROW_SCALES], dtype))
        assert shape is not None
        stamp(scales, *shape, dtype=dtype)
    return scales


def _zero_points(values: Mapping[str, ir.Value]) -> list[ir.Value]:
    return [values[ZERO_POINTS]] if ZERO_POINTS in values else []
