"""Tiny GGUF files, laid out from the format's definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from llama_onnx.exporter.model.config import LlamaConfig
from tests.support import tiny

EXACT = {Type.F32: np.float32, Type.F16: np.float16}
QUANTIZED = [Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
K_TYPES = [Type.Q4_K, Type.Q5_K, Type.Q6_K]
MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def metadata(config: LlamaConfig) -> dict[str, Any]:
    return {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def gguf_name(name: str) -> str:
    if name in MODEL:
        return MODEL[name]
    _, _, layer, *part, _ = name.split(".")
    return f"blk.{layer}.{LAYER['.'.join(part)]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows from half-split to interleaved, as programs that use the format define it."""
    head_dim = len(weight) // heads
    half = head_dim // 2
    order = [h * head_dim + j + k * half for h in range(heads) for j in range(half) for k in (0, 1)]
    return weight[order]


def stored_tensors(config: LlamaConfig) -> dict[str, np.ndarray]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    stored = {}
    for name, weight in tiny.weights(config).items():
        part = name.split(".")[-2]
        stored[gguf_name(name)] = permuted(weight, heads[part]) if part in heads else weight
    return stored


def random_blocks(shape: tuple[int, ...], kind: Type) -> np.ndarray:
    # Python has no quantizer for these; bytes below 0x3C give finite half floats at any offset.
    rng = np.random.default_rng(shape[0])
    size = gguf.quant_shape_to_byte_shape(shape, kind)
    return rng.integers(0, 0x3C, size, dtype=np.uint8)


def encoded(weight: np.ndarray, kind: Type) -> tuple[np.ndarray, Type]:
    if weight.ndim == 1:
        return weight, Type.F32
    if kind in EXACT:
        return weight.astype(EXACT[kind]), kind
    if kind in K_TYPES:
        return random_blocks(weight.shape, kind), kind
    return gguf.quantize(weight, kind), kind


def write(
    path: Path,
    config: LlamaConfig = tiny.GQA,
    kind: Type = Type.F32,
    *,
    arch: str = "llama",
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    kinds: Mapping[str, Type] | None = None,
) -> Path:
    """Write a GGUF file. `keys` overrides metadata (None removes), `extra` adds tensors; `kinds`
    has other types for tensors with one of its keys between the dots of their names."""
    writer = gguf.GGUFWriter(path, arch)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (metadata(config) | (keys or {})).items():
        if value is not None:
            adders[type(value)](key, value)
    for name, weight in (stored_tensors(config) | (extra or {})).items():
        own = (other for part, other in (kinds or {}).items() if part in name.split("."))
        data, raw = encoded(weight, next(own, kind))
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
