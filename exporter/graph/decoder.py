"""One decoder layer, line for line as in the PyTorch model."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from llama_onnx.exporter.config import LlamaConfig
from llama_onnx.exporter.graph.layers import MICROSOFT, Linear, RMSNorm, stamp
from llama_onnx.exporter.quantize.recipe import Recipe


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one layer, each [B, num_key_value_heads, T, head_dim]."""

    key: ir.Value
    value: ir.Value


@dataclass(frozen=True)
class Positions:
    """What attention must know of the batch, the same for all layers."""

    seqlens_k: ir.Value  # [B] int32: index of each row's last valid position
    total_sequence_length: ir.Value  # scalar int32: T
    cos_cache: ir.Value  # [max_position_embeddings, head_dim / 2]
    sin_cache: ir.Value  # [max_position_embeddings, head_dim / 2]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary embeddings inside the operator."""

    def __init__(self, name: str, config: LlamaConfig, recipe: Recipe) -> None:
        super().__init__()
        self.config = config
        hidden, rows = config.hidden_size, config.q_size + 2 * config.kv_size
        sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
        packed = {f"{name}.{part}_proj": size for part, size in sizes.items()}
        self.packed = recipe.fit_together([f"{part}.weight" for part in packed])
        if self.packed:
            self.qkv_proj = Linear(f"{name}.qkv_proj", rows, hidden, recipe, packed)
        else:  # a source's own codes may differ from one projection to the next
            self.q_proj, self.k_proj, self.v_proj = (
                Linear(part, size, hidden, recipe) for part, size in packed.items()
            )
        self.o_proj = Linear(f"{name}.o_proj", hidden, config.q_size, recipe)

    def forward(
        self, op: OpBuilder, x: ir.Value, past: KeyValue, positions: Positions
    ) -> tuple[ir.Value, KeyValue]:
        """[B, S, H] -> [B, S, H] and the keys and values, the new positions included."""
        config = self.config
        out, key, value = op.GroupQueryAttention(
            *self._project(op, x),
            past.key,
            past.value,
            positions.seqlens_k,
            positions.total_sequence_length,
            positions.cos_cache,
            positions.sin_cache,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
            _domain=MICROSOFT,
            _outputs=3,
        )
        stamp(out, "batch_size", "sequence_length", config.q_size)
        return self.o_proj(op, out), KeyValue(key, value)

    def _project(self, op: OpBuilder, x: ir.Value) -> tuple[ir.Value | None, ...]:
        """Query, key and value; when packed all in the first,
        [B, S, (num_attention_heads + 2 num_key_value_heads) head_dim]."""
        if self.packed:
            return self.qkv_proj(op, x), None, None
        return self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, name: str, config: LlamaConfig, recipe: Recipe) -> None:
        super().__init__()
        self.config = config
        self.fused = recipe.fuse_gate_up
        hidden, inner = config.hidden_size, config.intermediate_size
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        if self.fused:
            self.gate_up_proj = Linear(
                f"{name}.gate_up_proj", 2 * inner, hidden, recipe, {gate: inner, up: inner}
            )
        else:
            self.gate_proj = Linear(gate, inner, hidden, recipe)
            self.up_proj = Linear(up, inner, hidden, recipe)
        self.down_proj = Linear(f"{name}.down_proj", hidden, inner, recipe)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """[B, S, H] -> [B, S, H]."""
        shape = ("batch_size", "sequence_length", self.config.intermediate_size)
        if self.fused:
            gate, up = op.Split(self.gate_up_proj(op, x), axis=-1, num_outputs=2, _outputs=2)
        else:
            gate, up = self.gate_proj(op, x), self.up_proj(op, x)
        # QuickGelu(alpha=1) is x * sigmoid(x): SiLU in one operator.
        silu = op.QuickGelu(gate, alpha=1.0, _domain=MICROSOFT)
        return self.down_proj(op, op.Mul(stamp(silu, *shape), stamp(up, *shape)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP. The residual travels beside x, so that each add fuses with the
    norm behind it."""

    def __init__(self, index: int, config: LlamaConfig, recipe: Recipe) -> None:
        super().__init__()
        name, eps = f"model.layers.{index}", config.rms_norm_eps
        self.input_layernorm = RMSNorm(f"{name}.input_layernorm", config.hidden_size, eps)
        self.self_attn = Attention(f"{name}.self_attn", config, recipe)
        self.post_attention_layernorm = RMSNorm(
            f"{name}.post_attention_layernorm", config.hidden_size, eps
        )
        self.mlp = MLP(f"{name}.mlp", config, recipe)

    def forward(
        self,
        op: OpBuilder,
        x: ir.Value,
        residual: ir.Value | None,
        past: KeyValue,
        positions: Positions,
    ) -> tuple[ir.Value, ir.Value, KeyValue]:
        """x and residual [B, S, H]; their sum is the layer's input, and its output again."""
        x, residual = self.input_layernorm(op, x, residual)
        x, present = self.self_attn(op, x, past, positions)
        x, residual = self.post_attention_layernorm(op, x, residual)
        return self.mlp(op, x), residual, present
