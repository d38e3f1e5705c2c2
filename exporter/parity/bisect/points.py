"""PyTorch's values at points inside each stage, to compare with values of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.reference.hooks import attached
from llama_onnx.exporter.reference.walk import (
    Ids,
    decoder_layers,
    embed,
    final_norm,
    project,
    rotary_embedding,
    window_mask,
)

Points = dict[str, Float32]
"""Values by name, [N, ...] for the N tokens of one sequence. The name of a module, as in
transformers, means its output. Keys and values are [N, kv_heads, head_dim], the keys rotated."""

INPUT, RESIDUAL = "input", "residual"
"""The input of a layer (or of the last norm), and the sum that enters the layer's second norm."""

ATTENTION, KEY, VALUE = "self_attn", "self_attn.key", "self_attn.value"
ACTIVATION, PRODUCT = "mlp.act_fn", "mlp.product"
"""silu(gate), and silu(gate) * up."""

_OUTPUTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.act_fn",
    "mlp.down_proj",
)
# Matrices that a graph may store, and multiply by, as one.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
_INPUTS = {
    INPUT: "input_layernorm",
    ATTENTION: "self_attn.o_proj",
    RESIDUAL: "post_attention_layernorm",
    PRODUCT: "mlp.down_proj",
}


def walk_points(
    checkpoint: Checkpoint, sequences: Sequence[Ids]
) -> Iterator[tuple[str, list[Points]]]:
    """Yield the points of every sequence [N], stage by stage: "embedding", "layer 0", ..., "head".

    One layer's weights and one stage's points are in memory at a time.
    """
    with torch.inference_mode():
        rotary = rotary_embedding(checkpoint.config)
        hidden = embed(checkpoint, sequences)
    yield "embedding", [{"embed_tokens": x[0].numpy()} for x in hidden]
    layers = decoder_layers(checkpoint)
    for index in range(checkpoint.config.num_hidden_layers):
        with torch.inference_mode():
            layer = next(layers)
            masks = [window_mask(checkpoint.config, x.shape[1]) for x in hidden]
            found = [
                _layer_points(layer, rotary, x, mask) for x, mask in zip(hidden, masks, strict=True)
            ]
        hidden = [output for output, _ in found]
        yield f"layer {index}", [points for _, points in found]
    layers.close()
    with torch.inference_mode():
        normed = final_norm(checkpoint, hidden)
        logits = project(checkpoint, normed)
    yield (
        "head",
        [
            {INPUT: x[0].numpy(), "norm": norm.numpy(), "logits": rows}
            for x, norm, rows in zip(hidden, normed, logits, strict=True)
        ],
    )


class _Recorder:
    """Replaces a transformers cache, and keeps what one layer writes to it."""

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.key, self.value = key, value  # [1, kv_heads, N, head_dim]
        return key, value


def _layer_points(
    layer: LlamaDecoderLayer, rotary: LlamaRotaryEmbedding, x: Tensor, mask: Tensor | None
) -> tuple[Tensor, Points]:
    """Return the output [1, N, H] of `layer` for `x` [1, N, H], and its points."""
    points: Points = {}
    modules = dict(layer.named_modules())
    hooks = [modules[name].register_forward_hook(_keep_output(points, name)) for name in _OUTPUTS]
    hooks += [
        modules[module].register_forward_pre_hook(_keep_input(points, name))
        for name, module in _INPUTS.items()
    ]
    recorder = _Recorder()
    positions = torch.arange(x.shape[1])[None]
    with attached(hooks):
        output = layer(
            x,
            attention_mask=mask,
            position_embeddings=rotary(x, positions),
            past_key_values=recorder,
        )
    for fused, parts in _FUSED.items():
        points[fused] = np.concatenate([points[part] for part in parts], axis=-1)
    points[KEY] = recorder.key[0].transpose(0, 1).numpy()
    points[VALUE] = recorder.value[0].transpose(0, 1).numpy()
    return output, points


def _keep_output(points: Points, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        points[name] = output[0].numpy()

    return hook


def _keep_input(points: Points, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        points[name] = inputs[0][0].numpy()

    return hook
