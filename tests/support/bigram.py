"""A checkpoint that has learned a text: its next token depends on the last one alone.

All layers add nothing, so that the logits are the head times the normalized embedding, and what a
perturbed head loses can be computed by hand.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from llama_onnx.exporter.parity.measure.evaluation import built_in
from tests.support import tiny

CONFIG = tiny.GQA
LENGTH = 256  # tokens of each passage that are read
SILENT = (0, 32)
"""Features that are zero for every token: one in each block of 32, so that an outlier in these
columns of the head changes nothing but the step of its block."""


def passages(folder: Path) -> list[np.ndarray]:
    """Return the ids [N] of the evaluation text by the tokenizer in `folder`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [np.array(tokenizer.encode(text).ids[:LENGTH]) for text in built_in()]


def logits(embedding: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Return the logits [V, V] after each token, in float64."""
    x = embedding.astype(np.float64)
    h = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + CONFIG.rms_norm_eps)
    return h @ head.astype(np.float64).T


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def losses(ids: list[np.ndarray], original: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Return what the logits `other` [V, V] lose against `original` on `ids`, by hand."""
    p, q = log_softmax(original), log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    read = np.concatenate(ids)
    now, following = (
        np.concatenate([i[part] for i in ids]) for part in (slice(-1), slice(1, None))
    )
    return {
        "mean_kl": float(kl[read].mean()),
        "other_top1": float((p.argmax(axis=1) != q.argmax(axis=1))[read].mean()),
        "perplexity_ratio": float(np.exp((p - q)[now, following].mean())),
        "perplexity": float(np.exp(-p[now, following].mean())),
    }


@cache
def _learned() -> dict[str, np.ndarray]:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        tiny.write_tokenizer(Path(folder), CONFIG.vocab_size)
        ids = passages(Path(folder))
    counts = np.full((CONFIG.vocab_size, CONFIG.vocab_size), 0.01)
    for one in ids:
        np.add.at(counts, (one[:-1], one[1:]), 1)
    tensors = tiny.weights(CONFIG)
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor[:] = 0
    tensors["model.norm.weight"][:] = 1
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, SILENT] = 0
    h = logits(embedding, np.eye(CONFIG.hidden_size))
    weight = np.sqrt(counts.sum(axis=1, keepdims=True))
    target = np.log(counts / counts.sum(axis=1, keepdims=True))
    target -= target.mean(axis=1, keepdims=True)
    head = np.linalg.lstsq(h * weight, target * weight, rcond=None)[0].T
    tensors["lm_head.weight"] = head.astype(np.float32)
    return tensors


def learned() -> dict[str, np.ndarray]:
    """Return the weights, by Hugging Face name."""
    return {name: tensor.copy() for name, tensor in _learned().items()}


def with_outliers(size: float) -> dict[str, np.ndarray]:
    """Return the weights of the same function, with a weight of `size` in every block of the head:
    the step of four bits then grows, and smaller weights are rounded away."""
    tensors = learned()
    tensors["lm_head.weight"][:, SILENT] = size
    return tensors
