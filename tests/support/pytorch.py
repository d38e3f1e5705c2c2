"""The reference: transformers' own Llama, float32, eager attention."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import LlamaForCausalLM

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.reference.walk import reference_config
from tests.support import tiny

Array = npt.NDArray[Any]


@cache
def oracle(config: LlamaConfig) -> Any:
    """Return transformers' own model with the tiny weights, float32, eager attention."""
    settings = config.to_huggingface()
    for key in ("rope_scaling", "rope_theta", "architectures", "model_type"):
        del settings[key]
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.set_attn_implementation("eager")
    model.eval()
    weights = {name: torch.from_numpy(value) for name, value in tiny.weights(config).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


def reference(config: LlamaConfig, ids: Array) -> Array:
    with torch.no_grad():
        logits: Array = oracle(config)(torch.from_numpy(ids)).logits.numpy()
    return logits


def whole_model(config: LlamaConfig, tensors: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """Return transformers' own model with all its weights, loaded as float32."""
    model: LlamaForCausalLM = LlamaForCausalLM(reference_config(config))
    model.set_attn_implementation("eager")  # the walk does not
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


def run_whole(model: LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits
