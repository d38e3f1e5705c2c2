"""One decoder layer, matching the PyTorch model line for line."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from llama_onnx.exporter.graph.layers import CacheScales, Linear, RMSNorm
from llama_onnx.exporter.graph.names import KEY_CACHE, VALUE_CACHE, layer_module
from llama_onnx.exporter.graph.operators import Batch, Dialect, KeyValue, stamp, token_shape
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.recipe import Recipe


class Attention(nn.Module):
    """Self-attention with rotary embeddings, computed by `Batch.attend`."""

    def __init__(self, name: str, config: LlamaConfig, recipe: Recipe, dialect: Dialect) -> None:
        super().__init__()
        hidden, rows = config.hidden_size, config.q_size + 2 * config.kv_size
        sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
        packed = {f"{name}.{part}_proj": size for part, size in sizes.items()}
        self.packed = recipe.packs([f"{part}.weight" for part in packed])
        if self.packed:
            self.qkv_proj = Linear(f"{name}.qkv_proj", rows, hidden, recipe, dialect, packed)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                Linear(part, size, hidden, recipe, dialect) for part, size in packed.items()
            )
        self.o_proj = Linear(f"{name}.o_proj", hidden, config.q_size, recipe, dialect)
        self.int8_cache = recipe.cache is not None
        if self.int8_cache:
            self.key_cache, self.value_cache = (
                CacheScales(f"{name}.{part}", config) for part in (KEY_CACHE, VALUE_CACHE)
            )

    def forward(
        self, op: OpBuilder, x: ir.Value, past: KeyValue, batch: Batch
    ) -> tuple[ir.Value, KeyValue]:
        """Return the output [B, S, H] for x [B, S, H], and the cache with the new positions."""
        scales = KeyValue(self.key_cache(op), self.value_cache(op)) if self.int8_cache else None
        out, present = batch.attend(op, self._project(op, x), past, scales)
        return self.o_proj(op, out), present

    def _project(self, op: OpBuilder, x: ir.Value) -> tuple[ir.Value, ...]:
        """Return query, key and value, or all three in one value
        [B, S, (num_attention_heads + 2 num_key_value_heads) head_dim]."""
        if self.packed:
            return (self.qkv_proj(op, x),)
        return self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, name: str, config: LlamaConfig, recipe: Recipe, dialect: Dialect) -> None:
        super().__init__()
        self.config, self.dialect = config, dialect
        self.fused = recipe.fuse_gate_up
        hidden, inner = config.hidden_size, config.intermediate_size
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        if self.fused:
            self.gate_up_proj = Linear(
                f"{name}.gate_up_proj", 2 * inner, hidden, recipe, dialect, {gate: inner, up: inner}
            )
        else:
            self.gate_proj = Linear(gate, inner, hidden, recipe, dialect)
            self.up_proj = Linear(up, inner, hidden, recipe, dialect)
        self.down_proj = Linear(f"{name}.down_proj", hidden, inner, recipe, dialect)

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """Return the output [B, S, H] for x [B, S, H]."""
        shape = token_shape(self.config.intermediate_size)
        if self.fused:
            gate, up = op.Split(self.gate_up_proj(op, x), axis=-1, num_outputs=2, _outputs=2)
            stamp(gate, *shape, like=x)
            stamp(up, *shape, like=x)
        else:
            gate, up = self.gate_proj(op, x), self.up_proj(op, x)
        product = op.Mul(self.dialect.silu(op, gate), up)
        return self.down_proj(op, stamp(product, *shape, like=x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP. The residual is passed separately from x, so that each addition
    is fused with the norm after it."""

    def __init__(self, index: int, config: LlamaConfig, recipe: Recipe, dialect: Dialect) -> None:
        super().__init__()
        name, eps = layer_module(index), config.rms_norm_eps
        self.input_layernorm = RMSNorm(
            f"{name}.input_layernorm", config.hidden_size, eps, recipe, dialect
        )
        self.self_attn = Attention(f"{name}.self_attn", config, recipe, dialect)
        self.post_attention_layernorm = RMSNorm(
            f"{name}.post_attention_layernorm", config.hidden_size, eps, recipe, dialect
        )
        self.mlp = MLP(f"{name}.mlp", config, recipe, dialect)

    def forward(
        self,
        op: OpBuilder,
        x: ir.Value,
        residual: ir.Value | None,
        past: KeyValue,
        batch: Batch,
    ) -> tuple[ir.Value, ir.Value, KeyValue]:
        """Return x, residual and cache. The sum of x and residual [B, S, H] is the hidden state,
        before and after the layer."""
        x, residual = self.input_layernorm(op, x, residual)
        x, present = self.self_attn(op, x, past, batch)
        x, residual = self.post_attention_layernorm(op, x, residual)
        return self.mlp(op, x), residual, present
