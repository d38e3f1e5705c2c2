"""Runs the reference model layer by layer, with one layer in memory.

A 7B model in fp32 takes 27 GB, one of its layers 0.8 GB. A single decoder layer of transformers is
therefore filled with each layer's weights in turn, and all sequences pass through it before the
next layer's weights are read. Everything is float32.

A calibration can follow the same steps: `embed`, then for each of `decoder_layers` collect
statistics, quantize, and `advance`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from llama_onnx.exporter.formats.tensor import Float32, LazyTensor
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.reference.linear import multiply, multiply_with_onednn
from llama_onnx.targets.progress import SILENT, Progress

Ids = npt.NDArray[np.int64]

Module = TypeVar("Module", bound=nn.Module)

_CHUNK = 1 << 22  # float32 values read at a time: 16 MiB


def walk(
    checkpoint: Checkpoint, sequences: Sequence[Ids], progress: Progress = SILENT
) -> list[Float32]:
    """Return the logits of the model in `checkpoint` at every position of every sequence.

    `sequences` are token ids [S], run one by one without padding; the result is float32 [S, V] for
    each. Memory: one layer's weights, the hidden states, and the logits returned.
    """
    total = checkpoint.config.num_hidden_layers + 2
    logits: list[Float32] = []
    for done, (stage, states) in enumerate(walk_layers(checkpoint, sequences)):
        logits = states
        progress.update(stage, done + 1, total)
    return logits


def walk_layers(
    checkpoint: Checkpoint,
    sequences: Sequence[Ids],
    positions: Sequence[Ids] | None = None,
) -> Iterator[tuple[str, list[Float32]]]:
    """Yield each stage's name and the states of all sequences [S] after it.

    Stages are "embedding", "layer 0", "layer 1" and so on, with hidden states [S, H], and "head",
    with logits [S, V]. With `positions`, [n] for each sequence, logits are computed only there.
    """
    config = checkpoint.config
    with torch.inference_mode():
        rotary = rotary_embedding(config)
        hidden = embed(checkpoint, sequences)
    yield "embedding", _arrays(hidden)
    layers = decoder_layers(checkpoint)
    for index in range(config.num_hidden_layers):
        # Entered for each layer: the mode belongs to the thread, and the caller runs in between.
        with torch.inference_mode():
            layer = next(layers)
            multiply_with_onednn(layer)
            hidden = [advance(layer, rotary, x, window_mask(config, x.shape[1])) for x in hidden]
        yield f"layer {index}", _arrays(hidden)
    layers.close()
    with torch.inference_mode():
        if positions is not None:
            hidden = [x[:, torch.from_numpy(p)] for x, p in zip(hidden, positions, strict=True)]
        logits = project(checkpoint, final_norm(checkpoint, hidden), multiply)
    yield "head", logits


def walk_to_head(checkpoint: Checkpoint, sequences: Sequence[Ids]) -> list[Tensor]:
    """Return the states [1, S, H] of all sequences before the head; `read_out` has logits of them.

    For many sequences, whose logits together would not fit in memory.
    """
    config = checkpoint.config
    with torch.inference_mode():
        rotary = rotary_embedding(config)
        hidden = embed(checkpoint, sequences)
        for layer in decoder_layers(checkpoint):
            hidden = [advance(layer, rotary, x, window_mask(config, x.shape[1])) for x in hidden]
    return hidden


def embed(checkpoint: Checkpoint, sequences: Sequence[Ids]) -> list[Tensor]:
    """Return the embeddings [1, S, H] of each sequence. Reads only the rows that are used."""
    table = checkpoint.tensor("model.embed_tokens.weight")
    used = np.unique(np.concatenate(sequences))
    rows = np.concatenate([table.rows(int(i), int(i) + 1) for i in used])  # [used, H]
    return [torch.from_numpy(rows[np.searchsorted(used, ids)])[None] for ids in sequences]


def decoder_layers(
    checkpoint: Checkpoint, start: int = 0
) -> Generator[LlamaDecoderLayer, None, None]:
    """Yield every decoder layer from `start` in turn: the same module each time, with the layer's
    weights."""
    layer = _empty(lambda: LlamaDecoderLayer(reference_config(checkpoint.config), layer_idx=0))
    for index in range(start, checkpoint.config.num_hidden_layers):
        _fill(layer, checkpoint, f"model.layers.{index}.")
        yield layer


def advance(
    layer: LlamaDecoderLayer, rotary: LlamaRotaryEmbedding, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the hidden states [1, S, H] after `layer`, given those before it. `mask` is that of
    `window_mask`."""
    positions = torch.arange(x.shape[1])[None]  # [1, S]
    # Without a mask, attention is causal, and not all scores are in memory at once.
    output: Tensor = layer(x, attention_mask=mask, position_embeddings=rotary(x, positions))
    return output


def window_mask(config: LlamaConfig, length: int) -> Tensor | None:
    """Return which of `length` positions each token attends to, [1, 1, S, S]: itself and those
    before it, as many as the sliding window has. None without a window."""
    if config.window is None:
        return None
    ones = torch.ones(1, 1, length, length, dtype=torch.bool)
    return ones.tril() & ones.triu(1 - config.window)


def read_out(checkpoint: Checkpoint, hidden: Sequence[Tensor]) -> list[Float32]:
    """Return the logits [S, V] for the last layer's hidden states [1, S, H]."""
    return project(checkpoint, final_norm(checkpoint, hidden))


def final_norm(checkpoint: Checkpoint, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Return the normalized states [S, H] that the head reads, for hidden states [1, S, H]."""
    config = checkpoint.config
    norm = _empty(lambda: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    _fill(norm, checkpoint, "model.norm.")
    return [norm(x)[0] for x in hidden]


def project(
    checkpoint: Checkpoint,
    normed: Sequence[Tensor],
    product: Callable[[Tensor, Tensor], Tensor] = lambda x, weight: x @ weight.T,
) -> list[Float32]:
    """Return the logits [S, V] for normalized states [S, H]. The head is read in chunks."""
    logits = [np.empty((len(x), checkpoint.config.vocab_size), np.float32) for x in normed]
    start = 0
    for weight in head_chunks(checkpoint):
        stop = start + len(weight)
        for out, x in zip(logits, normed, strict=True):
            out[:, start:stop] = product(x, weight).numpy()
        start = stop
    return logits


def head_chunks(checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Yield the head [V, H] in chunks of rows."""
    tied = checkpoint.config.tie_word_embeddings
    head = checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
    for start, stop in _chunks(head):
        yield torch.from_numpy(head.rows(start, stop))


def rotary_embedding(config: LlamaConfig) -> LlamaRotaryEmbedding:
    """Return the rotary embedding in float32, never cast: after `.half()`, frequencies stay rounded
    even after `.float()`, an error of 1e-2 at position 40."""
    return LlamaRotaryEmbedding(reference_config(config))


def reference_config(config: LlamaConfig) -> transformers.LlamaConfig:
    """Return `config` as transformers' config, with float32 and fused causal attention."""
    reference = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=config.rope_parameters(),
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=torch.float32,
    )
    reference._attn_implementation = "sdpa"
    return reference


def _arrays(hidden: Sequence[Tensor]) -> list[Float32]:
    return [x[0].numpy() for x in hidden]


def _empty(make: Callable[[], Module]) -> Module:
    """Return a module in evaluation mode whose parameters are allocated but not initialized."""
    with torch.device("meta"):
        module = make()
    return module.to_empty(device="cpu").float().eval().requires_grad_(False)


@torch.no_grad()
def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Read the weights of `module`, as many pieces at a time as there are processors."""

    def read(piece: tuple[Tensor, LazyTensor, int, int]) -> None:
        parameter, tensor, start, stop = piece
        parameter.numpy()[start:stop] = tensor.rows(start, stop)

    pieces = [
        (parameter.detach(), tensor, start, stop)
        for name, parameter in module.named_parameters()
        for tensor in [checkpoint.tensor(prefix + name)]
        for start, stop in _chunks(tensor)
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in pool.map(read, pieces):
            pass


def _chunks(tensor: LazyTensor) -> Iterator[tuple[int, int]]:
    rows = tensor.shape[0]
    step = max(1, _CHUNK // int(np.prod(tensor.shape[1:], dtype=np.int64)))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
