"""Folders in the form of Meta's download, written from weights in Hugging Face's form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_onnx.exporter.model.config import LlamaConfig
from tests.support import tiny

CONFIG = LlamaConfig(
    vocab_size=520,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
)
"""Enough heads for eight shards."""

PARAMS = {
    "dim": 256,
    "multiple_of": 128,
    "n_heads": 16,
    "n_kv_heads": 8,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}

Tensors = dict[str, torch.Tensor]

AXES = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "output": 0,
    "tok_embeddings": 1,
}
"""The axis along which each of Meta's model-parallel layers is split."""

_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def whole(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return the tiny weights under Meta's names, with queries and keys interleaved."""
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    tensors = {}
    for name, weight in tiny.weights(config).items():
        stored_name = meta_name(name)
        kind = stored_name.split(".")[-2]
        stored = _interleaved(weight, heads[kind]) if kind in heads else weight
        tensors[stored_name] = torch.from_numpy(np.ascontiguousarray(stored)).to(dtype)
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    tensors["rope.freqs"] = 1.0 / config.rope_theta**exponents
    return tensors


def cut(tensors: Tensors, shards: int) -> list[Tensors]:
    """Split them into `shards` shards, each tensor along its layer's axis."""
    pieces: list[Tensors] = [{} for _ in range(shards)]
    for name, tensor in tensors.items():
        axis = AXES.get(name.removesuffix(".weight").split(".")[-1])
        parts = [tensor] * shards if axis is None else tensor.chunk(shards, axis)
        for piece, part in zip(pieces, parts, strict=True):
            piece[name] = part.clone()
    return pieces


def write_meta(
    folder: Path,
    tokenizer: bytes,
    config: LlamaConfig = CONFIG,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    params: dict[str, Any] | None = None,
    alter: Callable[[int, Tensors], None] | None = None,
) -> Path:
    """Write a folder. `params` overrides keys of params.json (None removes), `alter` changes the
    tensors of shard `index` before they are written."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {key: value for key, value in (PARAMS | (params or {})).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(raw), encoding="utf-8")
    for index, tensors in enumerate(cut(whole(config, dtype), shards)):
        if alter:
            alter(index, tensors)
        torch.save(tensors, folder / f"consolidated.{index:02}.pth")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "LICENSE.txt").write_text("a licence", encoding="utf-8")
    return folder


def write_checklist(folder: Path) -> Path:
    """Write the md5 of params.json and of every shard, as Meta lists them."""
    files = [*sorted(folder.glob("*.pth")), folder / "params.json"]
    lines = [f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (folder / "checklist.chk").write_text("".join(lines), encoding="utf-8")
    return folder / "checklist.chk"


def meta_name(name: str) -> str:
    """Return Meta's name of the tensor that Hugging Face calls `name`."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"layers.{layer}.{_NAMES[part]}.weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half, then row i of its second half, for every i."""
    size = len(weight) // heads
    order = [
        h * size + i + k * size // 2 for h in range(heads) for i in range(size // 2) for k in (0, 1)
    ]
    return weight[order]
