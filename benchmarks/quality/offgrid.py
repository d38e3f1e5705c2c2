"""The real model, moved off the grid that it was quantized on, without a change to its function.

SmolLM2-135M comes as 4-bit codes. Dequantized, its values are on a grid that another 4-bit
quantizer may hit again, and so look better than on a model that never had a grid. Norm gains are
therefore folded into the matrices that read the norm, and the channels between v and o, and between
up and down, are scaled by random factors whose inverse the next matrix gets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.checkpoints.gguf import GGUFCheckpoint, huggingface_name
from llama_onnx.exporter.model.config import LlamaConfig

Weights = dict[str, npt.NDArray[np.float32]]

SPREAD = 0.25
"""Standard deviation of the logarithm of a channel's factor."""

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norm -> the matrices that read it. The last norm stays: its reader is the tied embedding."""


def move_off_grid(weights: Mapping[str, Any], config: LlamaConfig, seed: int = 0) -> Weights:
    """Return the weights (Hugging Face names) of a model with the same function, off the grid."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> npt.NDArray[np.float32]:
        drawn = torch.exp(SPREAD * torch.randn(count, generator=generator))
        return np.asarray(drawn.numpy(), np.float32)

    moved: Weights = {name: np.array(value, np.float32) for name, value in weights.items()}
    shared = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm, readers in READERS.items():
            gain = moved[f"{prefix}{norm}.weight"]
            for reader in readers:
                moved[f"{prefix}{reader}.weight"] *= gain
            moved[f"{prefix}{norm}.weight"] = np.ones_like(gain)
        scale = factors(config.kv_size)
        moved[f"{prefix}self_attn.v_proj.weight"] *= scale[:, None]
        heads = scale.reshape(config.num_key_value_heads, config.head_dim)
        moved[f"{prefix}self_attn.o_proj.weight"] /= heads.repeat(shared, axis=0).reshape(-1)
        scale = factors(config.intermediate_size)
        moved[f"{prefix}mlp.up_proj.weight"] *= scale[:, None]
        moved[f"{prefix}mlp.down_proj.weight"] /= scale
    return moved


def write_folder(weights: Weights, original: GGUFCheckpoint, folder: Path) -> None:
    """Write a Hugging Face folder: config.json, tokenizer, model.safetensors in float32."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    content = original.config.to_huggingface() | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    original.write_tokenizer(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_gguf(weights: Weights, original: GGUFCheckpoint, path: Path) -> None:
    """Write the weights in float32 with the metadata of the original file."""
    import gguf

    reader = gguf.GGUFReader(original.path)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = 0 if field.name == "general.file_type" else field.contents()
        writer.add_key_value(field.name, value, *field.types[:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, _gguf_rows(tensor.name, weights, original.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_rows(name: str, weights: Weights, config: LlamaConfig) -> npt.NDArray[np.float32]:
    value = weights[huggingface_name(name)]
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return value
    # llama.cpp rotates adjacent rows, Hugging Face rows half a head apart.
    halves = value.reshape(-1, 2, config.head_dim // 2, value.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))


def largest_difference(first: Path, second: Path, tokens: npt.NDArray[Any]) -> dict[str, float]:
    """Return how far the logits of two checkpoints differ on `tokens` [1, S], in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    logits = []
    for folder in (first, second):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(torch.from_numpy(tokens.astype(np.int64))).logits)
    difference = (logits[0] - logits[1]).abs()
    return {
        "largest_logit_difference": float(difference.max()),
        "logit_standard_deviation": float(logits[0].std()),
    }
