"""The config of a Llama model, and how it is read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_onnx.exporter.model.rope import ROPE_TYPES, RopeScaling
from llama_onnx.exporter.model.special_tokens import SpecialTokens, special_tokens
from llama_onnx.exporter.model.typed_keys import Keys
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import shown

MATRICES = {
    "self_attn.q_proj": ("q_size", "hidden_size"),
    "self_attn.k_proj": ("kv_size", "hidden_size"),
    "self_attn.v_proj": ("kv_size", "hidden_size"),
    "self_attn.o_proj": ("hidden_size", "q_size"),
    "mlp.gate_proj": ("intermediate_size", "hidden_size"),
    "mlp.up_proj": ("intermediate_size", "hidden_size"),
    "mlp.down_proj": ("hidden_size", "intermediate_size"),
}
"""Linear layers of one decoder layer: name -> (out_features, in_features), as attribute names."""

_MAX_IDS = 1000  # that end a text

MIN_CONTEXT, MAX_CONTEXT = 8, 1 << 22
"""In positions; the rotary tables of a longer context would be larger than most models."""

MAX_LAYERS = 4096
"""Checked before anything is done for each layer; Llama 3.1 405B has 126."""

MIN_EPSILON, MAX_EPSILON = 1e-12, 0.1
"""Outside, all values are divided by nothing but the epsilon, or it is lost in float32."""

_MISTRAL_DEFAULTS = {
    "sliding_window": 4096,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
}
"""What a key that is missing means in the config of a Mistral, where it differs from a Llama's."""

NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama decoder. Fields have the names and meanings of Hugging Face's `LlamaConfig`, and
    `sliding_window` that of its `MistralConfig`: a token attends to so many positions, its own
    included; None for all."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None

    @property
    def window(self) -> int | None:
        """The sliding window if any text in the context is longer than it."""
        window = self.sliding_window
        return window if window is not None and window < self.max_position_embeddings else None

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the model, by Hugging Face name."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name, (rows, columns) in MATRICES.items():
                shapes[f"{prefix}{name}.weight"] = (getattr(self, rows), getattr(self, columns))
            for name in NORMS:
                shapes[f"{prefix}{name}.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def num_parameters(self) -> int:
        """Return the number of weights; a tied embedding is counted once."""
        total = 0
        for shape in self.tensor_shapes().values():
            size = 1
            for dim in shape:
                size *= dim
            total += size
        return total

    def rope_parameters(self) -> dict[str, Any]:
        """Return `rope_parameters` as transformers 5 defines them."""
        scaling = self.rope_scaling.to_huggingface() if self.rope_scaling else {}
        return {"rope_theta": self.rope_theta, "rope_type": "default", **scaling}

    def to_huggingface(self) -> dict[str, Any]:
        """Return the content of `config.json` as optimum and transformers (4 and 5) read it."""
        eos = list(self.eos_token_ids)
        mistral = self.sliding_window is not None
        scaling = self.rope_scaling.to_huggingface() if self.rope_scaling else None
        return {
            "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
            "model_type": "mistral" if mistral else "llama",
            **({"sliding_window": self.sliding_window} if mistral else {}),
            "attention_bias": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
            "pad_token_id": self.pad_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": False,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": self.rope_parameters(),
            "rope_scaling": scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "vocab_size": self.vocab_size,
        }


def config_from_huggingface(
    raw: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None
) -> LlamaConfig:
    """Build a config from the content of `config.json` (and of `generation_config.json`).

    `where` names the file in messages. Raises `CheckpointError` for a key that is missing or of the
    wrong type, `UnsupportedError` for a feature that a plain Llama does not have.
    """
    _refuse_features(raw, where)
    raw = {**_MISTRAL_DEFAULTS, **raw} if raw.get("model_type") == "mistral" else raw
    reader = Keys(raw, where)
    heads = reader.integer("num_attention_heads")
    hidden = reader.integer("hidden_size")
    if raw.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, "
            "and there is no head_dim."
        )
    rope = _rope_block(raw, where)
    context = reader.integer("max_position_embeddings", default=2048, most=1 << 62)
    vocabulary = reader.integer("vocab_size")
    tokens = read_special_tokens(raw, generation, vocabulary, where)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", default=heads),
        head_dim=reader.integer("head_dim", default=hidden // heads),
        max_position_embeddings=context,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6, MIN_EPSILON, MAX_EPSILON),
        rope_theta=Keys(rope, where).number("rope_theta"),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", default=False),
        bos_token_id=tokens.bos,
        eos_token_ids=tokens.eos,
        pad_token_id=tokens.pad,
        rope_scaling=rope_scaling(rope, context, where),
        sliding_window=_sliding_window(raw, reader),
    )
    check_config(config, where)
    return config


def check_config(config: LlamaConfig, where: str) -> None:
    """Raise `CheckpointError` or `UnsupportedError` for values that no kernel can run."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}."
        )
    if not MIN_CONTEXT <= config.max_position_embeddings <= MAX_CONTEXT:
        raise UnsupportedError(
            f"{where}: a context of {config.max_position_embeddings} positions is not between "
            f"{MIN_CONTEXT} and {MAX_CONTEXT}."
        )
    for token in (config.bos_token_id, config.pad_token_id, *config.eos_token_ids):
        if token is not None and token >= config.vocab_size:
            raise CheckpointError(
                f"{where}: the special token {token} is beyond the vocabulary of "
                f"{config.vocab_size} (generation_config.json included)."
            )
    if config.head_dim % 2:
        raise UnsupportedError(
            f"{where}: head_dim {config.head_dim} is odd, so rotary embeddings cannot pair its "
            "channels."
        )


def _refuse_features(raw: Mapping[str, Any], where: str) -> None:
    model_type = raw.get("model_type")
    if model_type not in ("llama", "mistral"):
        raise UnsupportedError(
            f"{where}: model_type is {shown(model_type)}; this tool exports the Llama architecture "
            "only ('llama', and 'mistral', which differs by its sliding window)."
        )
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != kinds[0] for kind in kinds):
        raise UnsupportedError(
            f"{where}: layer_types gives the layers different attention, which is not supported."
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UnsupportedError(f"{where}: {key} is true; biases are not supported.")
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(
            f"{where}: hidden_act {shown(activation)} is not supported, only 'silu'."
        )
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"{where}: partial_rotary_factor is not supported.")


def _sliding_window(raw: Mapping[str, Any], reader: Keys) -> int | None:
    """Return the window of a Mistral; transformers ignores the key in the config of a Llama."""
    if raw["model_type"] != "mistral" or raw["sliding_window"] is None:
        return None
    return reader.integer("sliding_window")


def _rope_block(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the rotary settings in config.json in the form of transformers 5."""
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(name) or {}, Mapping):
            raise CheckpointError(f"{where}: {name} must be an object, not {shown(raw[name])}.")
    # transformers 5 writes rope_parameters; 4.x wrote rope_theta and rope_scaling at the top level.
    # If there is a rope_scaling, transformers 5 uses it and ignores rope_parameters.
    # A value at the top level that is not used is checked as well: other readers use it.
    block: dict[str, Any] = {"rope_theta": Keys(raw, where).number("rope_theta", default=10000.0)}
    block |= raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if block.get("factor", 1) != 1 and not block.keys() & {"rope_type", "type"}:
        raise CheckpointError(f"{where}: the rope scaling has a factor but no type: add rope_type.")
    block["rope_type"] = block.get("rope_type", block.get("type", "default"))
    # As in transformers, a top-level length takes precedence over the one in the block.
    block |= _set(raw, "original_max_position_embeddings")
    if block.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(f"{where}: partial_rotary_factor is not supported.")
    return block


def _set(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: raw[key]} if raw.get(key) is not None else {}


def rope_scaling(block: Mapping[str, Any], context: int, where: str) -> RopeScaling | None:
    """Return the scaling described by `block`, which has the form of transformers' rope_parameters;
    None for the default. `context` is the model's max_position_embeddings.

    Raises `CheckpointError` for a value that is missing or invalid, `UnsupportedError` for a type
    that cannot be exported."""
    kind = block["rope_type"]
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UnsupportedError(
            f"{where}: rope type {shown(kind)} is not supported, only 'default', "
            f"{', '.join(map(repr, ROPE_TYPES))}."
        )
    keys, known = Keys(block, f"{where} (rope type {kind!r})"), ROPE_TYPES[kind]
    values: dict[str, Any] = {name: keys.number(name) for name in ("factor", *known.required)}
    values |= {name: keys.number(name) for name in known.optional if _set(block, name)}
    if kind == "llama3" and values["high_freq_factor"] <= values["low_freq_factor"]:
        raise CheckpointError(f"{where}: high_freq_factor must be above low_freq_factor.")
    if kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = keys.integer(
            "original_max_position_embeddings", default=context if kind == "yarn" else None
        )
    if kind == "yarn" and _set(block, "truncate"):
        values["truncate"] = bool(block["truncate"])
    return RopeScaling(kind, **values)


def _token_ids(raw: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = raw.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if len(values) > _MAX_IDS or not all(type(v) is int for v in values):
        raise CheckpointError(
            f"{where}: {key} must be a token id or a list of them, not {shown(value)}."
        )
    return tuple(v for v in values if v >= 0)


def read_special_tokens(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None, vocabulary: int, where: str
) -> SpecialTokens:
    """Return the special tokens; those in generation_config.json come before config.json's."""
    ids = {**raw, **{key: v for key, v in (generation or {}).items() if v is not None}}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    bos, eos, pad = (_token_ids(ids, name, where) for name in names)
    source = f"{where} or generation_config.json" if generation else where
    return special_tokens(bos, eos, pad, vocabulary, source)
