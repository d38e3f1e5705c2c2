"""Tiny LoRA adapters in PEFT's layout, and the result of merging them, from the equations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from llama_onnx.exporter.model.config import LlamaConfig
from tests.support import tiny

Array = npt.NDArray[Any]
Factors = Mapping[str, tuple[Array, Array]]
"""A and B by module, as PEFT stores them: a linear layer's are [r, in] and [out, r], an
embedding's [r, vocabulary] and [hidden, r]."""

EMBEDDING = "model.embed_tokens"
PREFIX = "base_model.model."
BASE_NAME = "somebody/some-llama"


def attention(layer: int, *letters: str) -> list[str]:
    """Return the names of the projections `letters` (q, k, v, o) of `layer`."""
    return [f"model.layers.{layer}.self_attn.{letter}_proj" for letter in letters]


def factors(
    ranks: Mapping[str, int], config: LlamaConfig = tiny.GQA, seed: int = 1
) -> dict[str, tuple[Array, Array]]:
    """Return random A and B of the given rank for each module, as large as the weights."""
    rng = np.random.default_rng(seed)
    shapes = {**config.tensor_shapes(), "lm_head.weight": (config.vocab_size, config.hidden_size)}
    made = {}
    for module, rank in ranks.items():
        rows, columns = shapes[f"{module}.weight"]
        if module == EMBEDDING:
            rows, columns = columns, rows
        a = rng.standard_normal((rank, columns)).astype(np.float32) / np.float32(np.sqrt(columns))
        b = rng.standard_normal((rows, rank)).astype(np.float32) / np.float32(np.sqrt(rank))
        made[module] = (a, b)
    return made


def write_adapter(
    folder: Path,
    changes: Factors,
    whole: Mapping[str, Array] | None = None,
    extra: Mapping[str, Array] | None = None,
    dtype: str = "fp32",
    **settings: Any,
) -> Path:
    """Write an adapter: `changes` by module, `whole` weights by module, `extra` tensors by full
    name; `settings` go into adapter_config.json (None removes a key)."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    tensors: dict[str, Array] = {}
    for module, (a, b) in changes.items():
        parts = (
            ("lora_embedding_A", "lora_embedding_B")
            if module == EMBEDDING
            else ("lora_A.weight", "lora_B.weight")
        )
        for part, value in zip(parts, (a, b), strict=True):
            tensors[f"{PREFIX}{module}.{part}"] = value.astype(kind)
    for module, value in (whole or {}).items():
        tensors[f"{PREFIX}{module}.weight"] = value.astype(kind)
    save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE_NAME,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted({module.rpartition(".")[2] for module in changes}),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        **settings,
    }
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


def merged(
    weights: Mapping[str, Array], changes: Factors, scalings: Mapping[str, float] | float
) -> dict[str, Array]:
    """Return W + scaling * B A, computed in float64 and rounded once; for an embedding, B A is
    transposed."""
    result = dict(weights)
    for module, (a, b) in changes.items():
        scaling = scalings if isinstance(scalings, float) else scalings[module]
        product = b.astype(np.float64) @ a.astype(np.float64)
        if module == EMBEDDING:
            product = product.T
        name = f"{module}.weight"
        result[name] = (result[name].astype(np.float64) + scaling * product).astype(np.float32)
    return result
