"""Calibrates a model: chooses codes for its matrices by what they read from a text.

The tokens pass through the original model, one layer in memory. Each layer's inputs decide its
channel scales and codes, which go to a folder before the next layer is read, so that memory does
not grow with the model and a calibration that was killed continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_onnx.exporter.calibration.collect import collect_layer
from llama_onnx.exporter.calibration.groups import GROUPS, Group
from llama_onnx.exporter.calibration.store import Calibrated, Stage, Store
from llama_onnx.exporter.checkpoints.folded import FoldedCheckpoint
from llama_onnx.exporter.formats.tensor import Float32, LazyTensor
from llama_onnx.exporter.model.channel_scales import ChannelScales, Exponents
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.storage import Blocks, Quantized
from llama_onnx.exporter.quantize.awq import SAMPLE, channel_exponents
from llama_onnx.exporter.quantize.base import CalibratedQuantizer, Quantizer
from llama_onnx.exporter.quantize.inputs import Collector, Inputs
from llama_onnx.exporter.reference.walk import (
    Ids,
    decoder_layers,
    embed,
    final_norm,
    rotary_embedding,
)
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.progress import SILENT, Progress

HEAD_STAGE = "head"

_ROWS = 1 << 19
"""Weights quantized at a time by one thread. Fixed, so that the codes do not depend on the number
of threads."""


@dataclass(frozen=True)
class Task:
    """What to calibrate: the storage of each tensor that gets codes, and whether channels may be
    rescaled."""

    checkpoint: Checkpoint
    quantizer: CalibratedQuantizer
    storages: Mapping[str, Blocks]
    rescales: bool


def calibrate(
    task: Task,
    sequences: Sequence[Ids],
    folder: Path,
    workers: int,
    progress: Progress = SILENT,
) -> Calibrated:
    """Choose codes for the tensors of `task` by the token ids `sequences` [S], in `folder`.

    What is complete in `folder` is kept. Raises `CheckpointError` for activations that are not
    finite.
    """
    store = Store(folder)
    config = task.checkpoint.config
    stages = [f"layer-{index}" for index in range(config.num_hidden_layers)]
    total = len(stages) + 1
    rotary = rotary_embedding(config)
    done = len(store.finished)
    hidden = _from_store(store) if done else embed(task.checkpoint, sequences)
    layers = decoder_layers(task.checkpoint, start=min(done, len(stages)))
    for index, (name, layer) in enumerate(zip(stages[done:], layers, strict=True), start=done):
        progress.update(f"calibrating layer {index}", index, total)
        hidden, inputs = collect_layer(
            layer, index, hidden, rotary, config, correlates=task.quantizer.correlates
        )
        stage = _quantize_layer(task, name, index, inputs, workers)
        store.put(stage, [x[0].numpy() for x in hidden])
    if HEAD_STAGE not in store.finished:
        progress.update("calibrating the head", total - 1, total)
        store.put(_quantize_head(task, hidden, workers), [])
    return store.result()


def _from_store(store: Store) -> list[Tensor]:
    return [torch.from_numpy(state)[None] for state in store.hidden()]


def _quantize_layer(
    task: Task, name: str, index: int, inputs: Mapping[Group, Inputs], workers: int
) -> Stage:
    prefix = f"model.layers.{index}."
    exponents: dict[str, Exponents] = {}
    if task.rescales:
        for group in GROUPS:
            names = [f"{prefix}{member}.weight" for member in group.members]
            exponents |= _exponents(task, prefix + group.scaled, names, inputs[group])
    scales = ChannelScales(exponents)
    matrices: dict[str, tuple[Quantized, Blocks]] = {}
    for group in GROUPS:
        names = [f"{prefix}{member}.weight" for member in group.members]
        matrices |= _quantize(task, names, scales, inputs[group], workers)
    return Stage(name, matrices, exponents)


def _exponents(
    task: Task, scaled: str, names: Sequence[str], inputs: Inputs
) -> dict[str, Exponents]:
    """Return the exponents of the channels between the module `scaled` and the tensors `names`;
    none if one of them is not quantized here, because it keeps the codes of its source."""
    storages = [task.storages.get(name) for name in names]
    storage = storages[0]
    norm = scaled.endswith("norm")
    if storage is None or None in storages or not (norm or f"{scaled}.weight" in task.storages):
        return {}
    rows = _sample([task.checkpoint.tensor(name) for name in names])
    shared, groups = 1, 1
    if scaled.endswith("self_attn.v_proj"):
        config = task.checkpoint.config
        groups = config.num_key_value_heads
        shared = config.num_attention_heads // groups
    return {scaled: channel_exponents(rows, inputs.squares, storage, shared, groups)}


def _sample(tensors: Sequence[LazyTensor]) -> Float32:
    """Return rows [R, K] spread evenly over `tensors`."""
    total = sum(tensor.shape[0] for tensor in tensors)
    found = []
    for tensor in tensors:
        share = max(1, SAMPLE * tensor.shape[0] // total)
        picked = np.unique(np.linspace(0, tensor.shape[0] - 1, share).astype(int))
        found += [_finite(tensor, int(row), int(row) + 1) for row in picked]
    return np.concatenate(found)


def _quantize_head(task: Task, hidden: Sequence[Tensor], workers: int) -> Stage:
    """Quantize the head by what it reads: the final states, normalized."""
    config = task.checkpoint.config
    tied = config.tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    if name not in task.storages:
        return Stage(HEAD_STAGE, {}, {})
    collector = Collector(config.hidden_size, correlates=task.quantizer.correlates)
    with torch.inference_mode():
        for state in hidden:
            (normed,) = final_norm(task.checkpoint, [state])
            collector.add(normed.numpy())
    if not collector.finite:
        raise CheckpointError(
            "the head reads NaN or infinity from the calibration's text: the weights are damaged, "
            "or the training diverged."
        )
    inputs = collector.inputs()
    exponents: dict[str, Exponents] = {}
    if task.rescales and not tied:
        exponents = _exponents(task, "model.norm", [name], inputs)
    matrices = _quantize(task, [name], ChannelScales(exponents), inputs, workers)
    return Stage(HEAD_STAGE, matrices, exponents)


def _quantize(
    task: Task, names: Sequence[str], scales: ChannelScales, inputs: Inputs, workers: int
) -> dict[str, tuple[Quantized, Blocks]]:
    """Return the tensors `names`, which share `inputs`, quantized after `scales` are folded in."""
    wanted = [name for name in names if name in task.storages]
    if not wanted:
        return {}
    folded = FoldedCheckpoint(task.checkpoint, scales)
    factors = scales.inputs(names[0].removesuffix(".weight"), task.checkpoint.config)
    quantizer = task.quantizer.with_inputs(inputs if factors is None else inputs.scaled(factors))
    return {
        name: (
            _all_rows(folded.tensor(name), quantizer, task.storages[name], workers),
            task.storages[name],
        )
        for name in wanted
    }


def _all_rows(tensor: LazyTensor, quantizer: Quantizer, storage: Blocks, workers: int) -> Quantized:
    rows, columns = tensor.shape
    step = max(1, _ROWS // columns)
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def quantize(part: tuple[int, int]) -> Quantized:
        return quantizer.quantize(_finite(tensor, *part), storage)

    with one_torch_thread(), ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(quantize, ranges))
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return Quantized(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let PyTorch use one thread for each of ours: teams of small operators wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finite(tensor: LazyTensor, start: int, stop: int) -> Float32:
    rows = tensor.rows(start, stop)
    if not np.isfinite(rows).all():
        raise CheckpointError(
            f"{tensor.name}, rows {start} to {stop - 1}: the weights hold NaN or infinity: the "
            "checkpoint is damaged, or its training diverged."
        )
    return rows
