"""Tiny checkpoints that the tests make themselves: random weights, real file formats, no hub."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.rope import RopeScaling

GQA = LlamaConfig(
    vocab_size=288,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=None,
)
"""Grouped-query attention, untied. Use `dataclasses.replace` for the other variants."""

ROPE_SCALINGS = {
    "linear": RopeScaling("linear", 4.0),
    "dynamic": RopeScaling("dynamic", 4.0),
    "llama3": RopeScaling(
        "llama3",
        4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": RopeScaling("yarn", 4.0, original_max_position_embeddings=64),
}
"""All extend a context of 64 to `GQA`'s 256, except `dynamic`, which keeps the original one."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_NUMPY_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random float32 weights by Hugging Face name, scaled to keep activations near one."""
    return {name: array.copy() for name, array in _weights(config, seed).items()}


@cache
def _weights(config: LlamaConfig, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            tensors[name] = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            scale = 1.0 if "embed_tokens" in name else 1.5 / np.sqrt(shape[1])
            tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return tensors


def write_huggingface(
    folder: Path,
    config: LlamaConfig = GQA,
    *,
    seed: int = 0,
    shards: int = 1,
    dtype: str = "fp32",
    tensors: dict[str, np.ndarray] | None = None,
    config_json: dict[str, Any] | None = None,
    licences: bool = True,
    pickled: bool = False,
) -> Path:
    """Write a Hugging Face folder. `config_json` overrides keys of config.json (None removes);
    `pickled` writes pytorch_model.bin instead of safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = config.to_huggingface() | (config_json or {})
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    kind = _NUMPY_DTYPES[dtype]
    data = {k: v.astype(kind) for k, v in (tensors or weights(config, seed)).items()}
    _write_weights(folder, data, shards, pickled)
    write_tokenizer(folder, config.vocab_size)
    if licences:
        (folder / "LICENSE.txt").write_text("a licence", encoding="utf-8")
        (folder / "USE_POLICY.md").write_text("a policy", encoding="utf-8")
    return folder


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level BPE tokenizer: <unk>, <s>, </s>, 256 bytes, merges up to vocab_size."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and the capital of France is Paris. " * 4
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_torch(data: dict[str, np.ndarray], path: Path) -> None:
    """Write a state dict as `torch.save` does, each tensor in its own dtype."""
    import torch

    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    torch.save(
        {
            name: torch.from_numpy(array.astype(np.float32)).to(names[array.dtype.name])
            for name, array in data.items()
        },
        path,
    )


def _write_weights(folder: Path, data: dict[str, np.ndarray], shards: int, pickled: bool) -> None:
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    parts = {
        f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}": list(data)[i::shards] for i in range(shards)
    }
    if shards == 1:
        parts = {f"{stem}.{suffix}": list(data)}
    for file, names in parts.items():
        part = {name: data[name] for name in names}
        if pickled:
            save_torch(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        total = sum(array.nbytes for array in data.values())
        weight_map = {name: file for file, names in parts.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
