"""Measures how large keys and values are, for the scales of a cache in int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from llama_onnx.exporter.calibration.states import not_finite
from llama_onnx.exporter.formats.safetensors import stored_tensors
from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.graph.names import KEY_CACHE, VALUE_CACHE, layer_module
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.reference.hooks import attached
from llama_onnx.exporter.reference.walk import (
    Ids,
    advance,
    decoder_layers,
    embed,
    rotary_embedding,
    window_mask,
)
from llama_onnx.targets.durable import replace_file
from llama_onnx.targets.progress import SILENT, Progress

_LARGEST = 127


def cache_scales(
    checkpoint: Checkpoint, sequences: Sequence[Ids], file: Path, progress: Progress = SILENT
) -> dict[str, Float32]:
    """Return the scales [num_key_value_heads, head_dim] of the keys and values of every layer, by
    the name of their slot: the largest magnitude of each channel in the token ids `sequences` [S]
    is 127 times its scale, and a larger one is cut off.

    They are kept in `file`; if it is there, they are read from it. Raises `CheckpointError` for
    values that are not finite.
    """
    if not file.exists():
        found = _measure(checkpoint, sequences, progress)
        file.parent.mkdir(exist_ok=True)
        replace_file(file, save(found))
    return {name: stored.read() for name, stored in stored_tensors(file).items()}


def _measure(
    checkpoint: Checkpoint, sequences: Sequence[Ids], progress: Progress
) -> dict[str, Float32]:
    config, found = checkpoint.config, dict[str, Float32]()
    rotary, hidden = rotary_embedding(config), embed(checkpoint, sequences)
    for index, layer in enumerate(decoder_layers(checkpoint)):
        progress.update(f"measuring the cache of layer {index}", index, config.num_hidden_layers)
        largest = _Largest(rotary, config.head_dim)
        with torch.inference_mode(), attached(largest.hooks(layer)):
            hidden = [advance(layer, rotary, x, window_mask(config, x.shape[1])) for x in hidden]
        for part, values in ((KEY_CACHE, largest.keys), (VALUE_CACHE, largest.values)):
            if not np.isfinite(values).all():
                raise not_finite(
                    f"layer {index}: keys or values are NaN or infinite on the calibration's text"
                )
            # A channel that is always zero needs any scale but zero.
            scales = np.where(values > 0, values / np.float32(_LARGEST), np.float32(1))
            found[f"{layer_module(index)}.self_attn.{part}"] = scales.astype(np.float32)
    return found


class _Largest:
    """Keeps the largest magnitude of each channel [num_key_value_heads, head_dim] of the keys, as
    they are rotated, and the values that a layer computes."""

    def __init__(self, rotary: LlamaRotaryEmbedding, head_dim: int) -> None:
        self.keys = self.values = np.zeros((1, head_dim), np.float32)
        self._rotary, self._head_dim = rotary, head_dim

    def hooks(self, layer: LlamaDecoderLayer) -> Iterator[RemovableHandle]:
        """Hook what looks at the results of the projections of `layer`."""
        yield layer.self_attn.k_proj.register_forward_hook(self._see_keys)
        yield layer.self_attn.v_proj.register_forward_hook(self._see_values)

    def _see_keys(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        keys = self._heads(output)
        cos, sin = self._rotary(keys, torch.arange(keys.shape[2])[None])
        _, rotated = apply_rotary_pos_emb(keys, keys, cos, sin)
        self.keys = _larger(self.keys, rotated)

    def _see_values(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.values = _larger(self.values, self._heads(output))

    def _heads(self, output: Tensor) -> Tensor:
        """Return [1, num_key_value_heads, S, head_dim] for [1, S, num_key_value_heads head_dim]."""
        heads = output.reshape(*output.shape[:2], -1, self._head_dim)
        return heads.transpose(1, 2)


def _larger(known: Float32, found: Tensor) -> Float32:
    largest: Float32 = found[0].abs().amax(1).numpy()  # which passes NaN on, as `maximum` does
    return np.maximum(known, largest)
