"""The complete model: token ids and cache in, logits and cache out.

Inputs   input_ids [B, S], attention_mask [B, T], past_key_values.N.key/value
Outputs  logits [B, S, V] (or [B, 1, V]), present.N.key/value
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, OpBuilder, nn

from llama_onnx.exporter.graph.decoder import DecoderLayer
from llama_onnx.exporter.graph.dialects import dialect_of
from llama_onnx.exporter.graph.layers import (
    Embedding,
    Linear,
    RMSNorm,
    TiedHead,
    Weighted,
)
from llama_onnx.exporter.graph.names import (
    COS_CACHE,
    EMBEDDING,
    FREQUENCIES,
    HEAD,
    NORM,
    POSITIONS,
    SIN_CACHE,
    initializer_name,
)
from llama_onnx.exporter.graph.operators import Batch, Dialect, KeyValue, stamp
from llama_onnx.exporter.graph.rotary import (
    Table,
    attention_scale,
    rotary_factors,
    rotary_tables,
)
from llama_onnx.exporter.graph.slots import DATA_TYPES, Slot
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.recipe import Recipe
from llama_onnx.exporter.model.storage import Floats
from llama_onnx.targets.graph_file import LARGEST_TABLE
from llama_onnx.targets.graph_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    KEY,
    LOGITS,
    VALUE,
    past_name,
    present_name,
)

IR_VERSION = 10


@dataclass(frozen=True)
class BuiltModel:
    """A graph without weights, and the slots that describe the source of each weight.

    `aliases` maps an initializer to the one whose bytes it shares.
    """

    ir: ir.Model
    slots: tuple[Slot, ...]
    aliases: dict[str, str]


def computes_tables(config: LlamaConfig, recipe: Recipe) -> bool:
    """Return whether the graph computes the rotary tables: in float32 only, and not if they are
    larger than a runtime accepts from a stranger."""
    size = config.max_position_embeddings * (config.head_dim // 2)
    computed = recipe.operators.computed_rotary and recipe.activations == "fp32"
    return computed and size <= LARGEST_TABLE


class RotaryTable(Weighted):
    """A constant table, or a factor of one, held in the `weight` parameter."""

    weight: nn.Parameter

    def __init__(self, name: str, table: Table, recipe: Recipe) -> None:
        super().__init__(Slot(name, (), table.shape, Floats(recipe.activations), table))

    def forward(self, op: OpBuilder) -> ir.Value:
        """Return the table."""
        return self.weight


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: LlamaConfig, recipe: Recipe, dialect: Dialect) -> None:
        super().__init__()
        source = (f"{EMBEDDING}.weight",)
        self.embed_tokens = Embedding(
            Slot(
                EMBEDDING,
                source,
                (config.vocab_size, config.hidden_size),
                recipe.storage_of(source, recipe.embedding),
                gathered=not recipe.operators.standard,
                keeps_codes=recipe.keeps_codes(source),
            ),
            dialect,
            DATA_TYPES[recipe.activations],
        )
        self.computed = computes_tables(config, recipe)
        self.scale = attention_scale(config.rope_scaling)
        if self.computed:
            positions, frequencies = rotary_factors(config)
            self.positions = RotaryTable(POSITIONS, positions, recipe)
            self.frequencies = RotaryTable(FREQUENCIES, frequencies, recipe)
        else:
            cos, sin = rotary_tables(config)
            self.cos_cache = RotaryTable(COS_CACHE, cos, recipe)
            self.sin_cache = RotaryTable(SIN_CACHE, sin, recipe)
        self.layers = nn.ModuleList(
            [
                DecoderLayer(index, config, recipe, dialect)
                for index in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(NORM, config.hidden_size, config.rms_norm_eps, recipe, dialect)

    def forward(
        self, op: OpBuilder, ids: ir.Value, batch: Batch, past: list[KeyValue]
    ) -> tuple[ir.Value, list[KeyValue]]:
        """Return the final hidden states [B, S, H] of `ids`, which `batch` has arranged, and the
        cache."""
        batch = batch.with_tables(self._tables(op))
        x, residual = self.embed_tokens(op, ids), None
        present = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, residual, key_value = layer(op, x, residual, layer_past, batch)
            present.append(key_value)
        x, _ = self.norm(op, x, residual)
        return x, present

    def _tables(self, op: OpBuilder) -> tuple[ir.Value, ir.Value]:
        """Return cos and sin [max_position_embeddings, head_dim / 2]: from the data file, or
        computed of positions and frequencies, when ONNX Runtime opens the package."""
        if not self.computed:
            return self.cos_cache(op), self.sin_cache(op)
        angles = op.Mul(self.positions(op), self.frequencies(op))
        cos, sin = op.Cos(angles), op.Sin(angles)
        if self.scale == 1:
            return cos, sin
        scale = ir.tensor(np.array(self.scale, np.float32), name="rotary_scale")
        factor = op.builder.initializer(scale)
        return op.Mul(cos, factor), op.Mul(sin, factor)


class LlamaForCausalLM(nn.Module):
    """The model with its head."""

    def __init__(self, config: LlamaConfig, recipe: Recipe, dialect: Dialect) -> None:
        super().__init__()
        self.config, self.logits = config, recipe.logits
        self.dialect = dialect
        self.model = LlamaModel(config, recipe, dialect)
        self.lm_head: nn.Module
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = Linear(
                HEAD, config.vocab_size, config.hidden_size, recipe, dialect, storage=recipe.head
            )

    def forward(
        self, op: OpBuilder, input_ids: ir.Value, mask: ir.Value, past: list[KeyValue]
    ) -> tuple[ir.Value, list[KeyValue]]:
        """Return logits [B, S, V] (or [B, 1, V]) and the cache."""
        batch = self.dialect.batch(op, self.config, input_ids, mask)
        hidden, present = self.model(op, batch.arrange(op, input_ids), batch, past)
        pick = batch.last if self.logits == "last" else batch.restore
        return self.lm_head(op, pick(op, hidden)), present


def build_model(config: LlamaConfig, recipe: Recipe) -> BuiltModel:
    """Build the graph of `config` with the storages and operators of `recipe`; reads no weights."""
    dialect = dialect_of(recipe)
    opsets = {"": recipe.operators.opset, **dialect.domains}
    graph = ir.Graph([], [], nodes=[], opset_imports=opsets, name="llama")
    builder = GraphBuilder(graph)
    model = LlamaForCausalLM(config, recipe, dialect)
    input_ids = builder.input(INPUT_IDS, ir.DataType.INT64, ["batch_size", "sequence_length"])
    mask = builder.input(ATTENTION_MASK, ir.DataType.INT64, ["batch_size", "total_sequence_length"])
    dtype = DATA_TYPES[recipe.activations]
    past = [_past(builder, config, dtype, index) for index in range(config.num_hidden_layers)]
    logits, present = model(builder.op, input_ids, mask, past)
    length = 1 if recipe.logits == "last" else "sequence_length"
    logits = stamp(logits, "batch_size", length, config.vocab_size, dtype=dtype)
    builder.add_output(logits, LOGITS)
    for index, key_value in enumerate(present):
        for part, value in ((KEY, key_value.key), (VALUE, key_value.value)):
            stamp(value, *_cache_shape(config, "total_sequence_length"), dtype=dtype)
            builder.add_output(value, present_name(index, part))
    slots = tuple(module.slot for module in model.modules() if isinstance(module, Weighted))
    head = model.lm_head
    own = head.own if isinstance(head, TiedHead) else ()
    aliases = {initializer_name(HEAD, p): initializer_name(EMBEDDING, p) for p in own}
    ir_model = ir.Model(graph, ir_version=IR_VERSION, producer_name="llama-onnx")
    return BuiltModel(ir_model, slots, aliases)


def _past(builder: GraphBuilder, config: LlamaConfig, dtype: ir.DataType, index: int) -> KeyValue:
    shape = _cache_shape(config, "past_sequence_length")
    key, value = (builder.input(past_name(index, part), dtype, shape) for part in (KEY, VALUE))
    return KeyValue(key, value)


def _cache_shape(config: LlamaConfig, length: str) -> tuple[int | str, ...]:
    return ("batch_size", config.num_key_value_heads, length, config.head_dim)
