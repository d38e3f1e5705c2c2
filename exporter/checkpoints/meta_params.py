"""Meta's `params.json`, completed with values from the tensors and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_onnx.exporter.model.config import (
    MAX_EPSILON,
    MAX_LAYERS,
    MIN_EPSILON,
    LlamaConfig,
    check_config,
)
from llama_onnx.exporter.model.typed_keys import Keys, is_number
from llama_onnx.exporter.tokenizer.model_file import ModelFileFacts
from llama_onnx.targets.errors import CheckpointError, UnsupportedError

Shapes = Mapping[str, tuple[int, ...]]
"""Hugging Face name -> shape of the joined tensor."""

ROTARY_BUFFER = "rope.freqs"
"""A buffer saved with the weights, once or in every layer; it follows from the config."""

_EMBEDDING, _GATE = "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"
_REFUSED = ("use_scaled_rope", "quantization_args", "lora_args", "moe", "moe_args", "vision_args")


def config_from_params(
    raw: Mapping[str, Any], where: str, folder: str, shapes: Shapes, tokens: ModelFileFacts
) -> LlamaConfig:
    """Return the config for `raw`, the content of the params.json at `where`; `folder` is the name
    of the model's folder.

    Raises `CheckpointError` for a value that contradicts the tensors or the tokenizer,
    `UnsupportedError` for a feature that is not supported.
    """
    for key in _REFUSED:
        if raw.get(key):
            raise UnsupportedError(f"{where}: {key} is set, which is not supported.")
    keys = Keys(raw, where)
    vocab_size, dim = _shape(shapes, _EMBEDDING, where)
    intermediate_size, _ = _shape(shapes, _GATE, where)
    heads = keys.integer("n_heads")
    _require_equal(where, "dim", keys.integer("dim"), dim)
    _require_equal(where, "n_layers", keys.integer("n_layers"), _layers(shapes))
    if raw.get("vocab_size") not in (None, -1):  # -1 means the tokenizer's size
        _require_equal(where, "vocab_size", keys.integer("vocab_size"), vocab_size)
    if dim % heads:
        raise CheckpointError(f"{where}: dim {dim} is not a multiple of n_heads {heads}.")
    _check_frequencies(shapes, dim // heads, where)
    if tokens.size != vocab_size:
        raise CheckpointError(
            f"{where}: the tokenizer has {tokens.size:,} tokens, but the embedding {vocab_size:,} "
            "rows: use the tokenizer.model of this model."
        )
    if "multiple_of" in raw:
        _require_equal(where, "multiple_of", _feed_forward(dim, keys, raw), intermediate_size)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=intermediate_size,
        num_hidden_layers=keys.integer("n_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("n_kv_heads", default=heads),
        head_dim=dim // heads,
        max_position_embeddings=_context(keys, raw, folder),
        rms_norm_eps=keys.number("norm_eps", None, MIN_EPSILON, MAX_EPSILON),
        rope_theta=keys.number("rope_theta", default=10000.0),
        tie_word_embeddings=False,
        bos_token_id=tokens.bos_id,
        eos_token_ids=() if tokens.eos_id is None else (tokens.eos_id,),
    )
    check_config(config, where)
    return config


def _shape(shapes: Shapes, name: str, where: str) -> tuple[int, int]:
    shape = shapes.get(name, ())
    if len(shape) != 2:
        raise CheckpointError(f"{where}: the shards lack the matrix {name}: download them again.")
    return shape[0], shape[1]


def _layers(shapes: Shapes) -> int:
    numbers = (name.split(".")[2] for name in shapes if name.startswith("model.layers."))
    return 1 + max((int(number) for number in numbers if is_number(number)), default=-1)


def _check_frequencies(shapes: Shapes, head_dim: int, where: str) -> None:
    # Only this tensor shows how many heads share the rows of the queries.
    for name, shape in shapes.items():
        if name.endswith(ROTARY_BUFFER):
            _require_equal(where, "dim / n_heads", head_dim, 2 * shape[-1])


def _require_equal(where: str, key: str, stated: int, found: int) -> None:
    if stated != found:
        raise CheckpointError(
            f"{where}: {key} gives {stated}, but the tensors have {found}: params.json and shards "
            "are from different models."
        )


def _feed_forward(dim: int, keys: Keys, raw: Mapping[str, Any]) -> int:
    """Return intermediate_size as Meta's model.py computes it."""
    size, multiple = int(2 * (4 * dim) / 3), keys.integer("multiple_of")
    if raw.get("ffn_dim_multiplier") is not None:
        size = int(keys.number("ffn_dim_multiplier", most=100) * size)
    return multiple * (-(-size // multiple))


def _context(keys: Keys, raw: Mapping[str, Any], folder: str) -> int:
    """Return the number of positions the model was trained on, which params.json does not contain.

    Code Llama is recognized by its rope_theta. Llama 2 is recognized by the name of Meta's folder,
    because its 7B chat model has Llama 1's norm_eps. Llama 1 is recognized by that norm_eps; its
    65B model, which has Llama 2's, by its size without grouped queries.
    """
    if keys.number("rope_theta", default=10000.0) == 1e6:
        return 16384
    if "llama2" in folder.lower().replace("-", ""):
        return 4096
    first_65b = raw.get("dim") == 8192 and raw.get("n_kv_heads") is None
    return 2048 if first_65b or keys.number("norm_eps") == 1e-6 else 4096
