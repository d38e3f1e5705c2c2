"""The whole model: tokens and cache in, logits and cache out.

Inputs   input_ids [B, S], attention_mask [B, T], past_key_values.N.key/value
Outputs  logits [B, S, V] (or [B, 1, V]), present.N.key/value
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import GraphBuilder, OpBuilder, nn

from llama_onnx.exporter.config import LlamaConfig
from llama_onnx.exporter.graph.decoder import DecoderLayer, KeyValue, Positions
from llama_onnx.exporter.graph.layers import Embedding, Linear, RMSNorm, TiedHead, Weighted, stamp
from llama_onnx.exporter.graph.rotary import Table, rotary_tables
from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.quantize.recipe import Blocks, Float, Recipe

OPSETS = {"": 23, "com.microsoft": 1}
IR_VERSION = 10


@dataclass(frozen=True)
class BuiltModel:
    """A graph without weights, and the slots that say where each weight comes from.

    `aliases` maps an initializer to the one whose bytes it shares.
    """

    ir: ir.Model
    slots: tuple[Slot, ...]
    aliases: dict[str, str]


@dataclass(frozen=True)
class Window:
    """The new positions of a batch, with the padding of each row worked out.

    GroupQueryAttention wants each row's valid positions in front (right padding, as genai pads);
    most Python code pads on the left. Rows that are padded on the left are rotated to the front on
    the way in and back on the way out: token ids and hidden states, both small, instead of a mask
    of [B, S, T] in every layer.
    """

    seqlens_k: ir.Value  # [B] int32: index of each row's last valid position
    total_sequence_length: ir.Value  # scalar int32: T
    valid: ir.Value  # [B, 1] int64: valid positions among the S new ones
    front: ir.Value  # [B, S] int64: where position s of the rotated row stood
    back: ir.Value  # [B, S] int64: the inverse

    @classmethod
    def of(cls, op: OpBuilder, input_ids: ir.Value, mask: ir.Value) -> Window:
        """Work out the window of `input_ids` [B, S] under `mask` [B, T]."""
        lengths = op.ReduceSum(mask, [1], keepdims=0)  # [B]
        seqlens_k = op.Cast(op.Sub(lengths, 1), to=ir.DataType.INT32)
        total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2), [0]), to=ir.DataType.INT32)
        size = op.Shape(input_ids, start=1, end=2)  # [1]
        new = op.Slice(mask, op.Neg(size), [2**31 - 1], [1])  # [B, S]
        padding = op.ArgMax(new, axis=1, keepdims=1)  # [B, 1] zeros in front of the first one
        steps = op.Range(0, op.Squeeze(size, [0]), 1)  # [S]
        front = op.Mod(op.Add(steps, padding), size)
        back = op.Mod(op.Sub(op.Add(steps, size), padding), size)
        return cls(seqlens_k, total, op.ReduceSum(new, [1], keepdims=1), front, back)

    def to_front(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """Rotate token ids [B, S] so that valid ones stand in front."""
        return op.GatherElements(input_ids, self.front, axis=1)

    def restore(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Rotate hidden states [B, S, H] back to where their tokens stood."""
        return op.GatherND(hidden, op.Unsqueeze(self.back, [2]), batch_dims=1)

    def last(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        """Hidden state of each row's last valid position, [B, 1, H]."""
        index = op.Unsqueeze(op.Sub(self.valid, 1), [2])  # [B, 1, 1]
        return op.GatherND(hidden, index, batch_dims=1)


class RotaryTable(Weighted):
    """A constant table; its `weight` parameter is the table itself."""

    def __init__(self, name: str, table: Table) -> None:
        super().__init__(Slot(name, (), table.shape, Float(32), table))

    def forward(self, op: OpBuilder) -> ir.Value:
        """[max_position_embeddings, head_dim / 2]."""
        return self.weight


class LlamaModel(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: LlamaConfig, recipe: Recipe) -> None:
        super().__init__()
        self.embed_tokens = Embedding(
            Slot(
                "model.embed_tokens",
                ("model.embed_tokens.weight",),
                (config.vocab_size, config.hidden_size),
                recipe.embedding,
                gathered=True,
            )
        )
        cos, sin = rotary_tables(config)
        self.cos_cache = RotaryTable("model.cos_cache", cos)
        self.sin_cache = RotaryTable("model.sin_cache", sin)
        self.layers = nn.ModuleList(
            [DecoderLayer(index, config, recipe) for index in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm("model.norm", config.hidden_size, config.rms_norm_eps)

    def forward(
        self, op: OpBuilder, input_ids: ir.Value, window: Window, past: list[KeyValue]
    ) -> tuple[ir.Value, list[KeyValue]]:
        """Return the final hidden states [B, S, H], valid positions in front, and the cache."""
        positions = Positions(
            window.seqlens_k, window.total_sequence_length, self.cos_cache(op), self.sin_cache(op)
        )
        x, residual = self.embed_tokens(op, window.to_front(op, input_ids)), None
        present = []
        for layer, layer_past in zip(self.layers, past, strict=True):
            x, residual, key_value = layer(op, x, residual, layer_past, positions)
            present.append(key_value)
        x, _ = self.norm(op, x, residual)
        return x, present


class LlamaForCausalLM(nn.Module):
    """The model with its head."""

    def __init__(self, config: LlamaConfig, recipe: Recipe) -> None:
        super().__init__()
        self.logits = recipe.logits
        self.model = LlamaModel(config, recipe)
        self.lm_head: nn.Module
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model.embed_tokens, recipe.accuracy_level)
        else:
            self.lm_head = Linear(
                "lm_head", config.vocab_size, config.hidden_size, recipe, storage=recipe.head
            )

    def forward(
        self, op: OpBuilder, input_ids: ir.Value, mask: ir.Value, past: list[KeyValue]
    ) -> tuple[ir.Value, list[KeyValue]]:
        """Return logits [B, S, V] (or [B, 1, V]) and the cache."""
        window = Window.of(op, input_ids, mask)
        hidden, present = self.model(op, input_ids, window, past)
        pick = window.last if self.logits == "last" else window.restore
        return self.lm_head(op, pick(op, hidden)), present


def build_model(config: LlamaConfig, recipe: Recipe) -> BuiltModel:
    """Build the graph of `config` as `recipe` stores it. No weight is read."""
    graph = ir.Graph([], [], nodes=[], opset_imports=OPSETS, name="llama")
    builder = GraphBuilder(graph)
    model = LlamaForCausalLM(config, recipe)
    input_ids = builder.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    mask = builder.input(
        "attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"]
    )
    past = [_past(builder, config, index) for index in range(config.num_hidden_layers)]
    logits, present = model(builder.op, input_ids, mask, past)
    length = 1 if recipe.logits == "last" else "sequence_length"
    builder.add_output(stamp(logits, "batch_size", length, config.vocab_size), "logits")
    for index, key_value in enumerate(present):
        for part, value in (("key", key_value.key), ("value", key_value.value)):
            stamp(value, *_cache_shape(config, "total_sequence_length"))
            builder.add_output(value, f"present.{index}.{part}")
    slots = tuple(module.slot for module in model.modules() if isinstance(module, Weighted))
    aliases = {}
    if config.tie_word_embeddings and isinstance(recipe.head, Blocks):
        aliases["lm_head.qweight"] = "model.embed_tokens.qweight"
    ir_model = ir.Model(graph, ir_version=IR_VERSION, producer_name="llama-onnx")
    return BuiltModel(ir_model, slots, aliases)


def _past(builder: GraphBuilder, config: LlamaConfig, index: int) -> KeyValue:
    shape = _cache_shape(config, "past_sequence_length")
    name = f"past_key_values.{index}"
    return KeyValue(
        builder.input(f"{name}.key", ir.DataType.FLOAT, shape),
        builder.input(f"{name}.value", ir.DataType.FLOAT, shape),
    )


def _cache_shape(config: LlamaConfig, length: str) -> tuple[int | str, ...]:
    return ("batch_size", config.num_key_value_heads, length, config.head_dim)
