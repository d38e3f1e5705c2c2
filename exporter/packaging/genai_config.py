"""genai_config.json: what onnxruntime-genai needs to run the package."""

from __future__ import annotations

from typing import Any

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.exporter.model.recipe import CacheMode
from llama_onnx.runtime.engine.sampling.parameters import RULES, genai_values
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.genai_settings import LOG_ID, MODEL_TYPE
from llama_onnx.targets.graph_names import (
    ATTENTION_MASK,
    INPUT_IDS,
    KEY,
    LOGITS,
    PAST,
    PRESENT,
    VALUE,
)
from llama_onnx.targets.printable import shown
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.target import FloatName, Session

CACHE_BUDGET = 1 << 30
"""genai allocates the cache for `max_length` up front: by default at most 1 GiB."""


def cache_bytes_per_token(config: LlamaConfig, cache_type: FloatName | CacheMode = "fp32") -> int:
    """Return the bytes that keys and values of one position take in all layers."""
    size = 1 if cache_type == "int8" else DTYPES[cache_type].itemsize
    return 2 * size * config.num_hidden_layers * config.kv_size


def default_max_length(config: LlamaConfig, cache_type: FloatName | CacheMode = "fp32") -> int:
    """Return the context, or the largest power of two, 256 or more, that fits `CACHE_BUDGET`."""
    fitting = max(256, CACHE_BUDGET // cache_bytes_per_token(config, cache_type))
    if fitting >= config.max_position_embeddings:
        return config.max_position_embeddings
    return 1 << (fitting.bit_length() - 1)


def genai_config(
    config: LlamaConfig,
    search: dict[str, Any],
    session: Session,
    model_file: str,
    cache_type: FloatName | CacheMode = "fp32",
) -> dict[str, Any]:
    """Return the content of genai_config.json. `search` has the model's own sampling defaults."""
    provider = session.provider
    model: dict[str, Any] = {
        "type": MODEL_TYPE,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "eos_token_id": _one_or_many(config.eos_token_ids),
        # genai pads batches with it; without a pad token, the end token is used, as is usual.
        "pad_token_id": _first(config.pad_token_id, *config.eos_token_ids, 0),
        "decoder": {
            "filename": model_file,
            "head_size": config.head_dim,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "session_options": {
                "log_id": LOG_ID,
                **provider.session_options,
                **session.options,
                "provider_options": _provider_options(provider),
            },
            "inputs": {
                "input_ids": INPUT_IDS,
                "attention_mask": ATTENTION_MASK,
                "past_key_names": PAST + KEY,
                "past_value_names": PAST + VALUE,
            },
            "outputs": {
                "logits": LOGITS,
                "present_key_names": PRESENT + KEY,
                "present_value_names": PRESENT + VALUE,
            },
        },
    }
    if config.bos_token_id is not None:
        model["bos_token_id"] = config.bos_token_id
    defaults: dict[str, Any] = {
        "do_sample": False,
        "max_length": default_max_length(config, cache_type),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": session.shared_buffer,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    values = genai_values(defaults | search, config.vocab_size)
    return {"model": model, "search": defaults | values}


def _provider_options(provider: Provider) -> list[dict[str, dict[str, str]]]:
    if provider.genai_name is None:
        return []
    return [{provider.genai_name: dict(provider.provider_options)}]


def check_search(search: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `search` as genai takes it, read as the command line's options are.

    Raises `CheckpointError` that names a value which means nothing.
    """
    values = {}
    for key, value in search.items():
        rule = RULES[key]
        values[key] = rule.read(value)
        if values[key] is None:
            raise CheckpointError(
                f"{where}: generation_config.json sets {key} to {shown(value)}, which is not "
                f"{rule.meaning}: correct or remove it."
            )
    return values


def _one_or_many(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
