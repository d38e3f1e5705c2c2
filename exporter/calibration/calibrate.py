"""Calibrates a model: chooses codes for its matrices by what they read from a text.

The tokens pass through the original model, one layer in memory. Each layer's inputs decide its
channel scales and codes, which go to a folder before the next layer is read, so that memory does
not grow with the model and a calibration that was killed continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama_onnx.exporter.calibration.collect import collect_layer
from llama_onnx.exporter.calibration.groups import GROUPS, MEMBERS
from llama_onnx.exporter.calibration.scaling import group_exponents, spread
from llama_onnx.exporter.calibration.states import not_finite
from llama_onnx.exporter.calibration.store import Calibrated, Stage, Store
from llama_onnx.exporter.calibration.token_weights import HEAD, seen_by
from llama_onnx.exporter.checkpoints.folded import FoldedCheckpoint
from llama_onnx.exporter.formats.tensor import Float32, LazyTensor, damaged_rows
from llama_onnx.exporter.model.channel_scales import ChannelScales, Exponents
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.storage import Blocks, Quantized, pack
from llama_onnx.exporter.quantize.awq import SAMPLE
from llama_onnx.exporter.quantize.base import CalibratedQuantizer, Quantizer
from llama_onnx.exporter.quantize.inputs import Collector, Inputs
from llama_onnx.exporter.reference.walk import (
    Ids,
    decoder_layers,
    embed,
    final_norm,
    read_out,
    rotary_embedding,
)
from llama_onnx.targets.progress import SILENT, Progress

_PREDICTED = (4, 64)  # sequences, and tokens at the end of each, whose likelihood is computed
_VALUES, _ROWS = 1 << 19, 512
"""Weights quantized at a time by one thread, or rows if each column is a step of its own. Fixed, so
that the codes do not depend on the number of threads."""


@dataclass(frozen=True)
class Task:
    """What to calibrate: the storage of each tensor that gets codes, and whether channels may be
    rescaled. `weights` is the folder in which `weigh` put how much each token counts; None: all
    count the same."""

    checkpoint: Checkpoint
    quantizer: CalibratedQuantizer
    storages: Mapping[str, Blocks]
    rescales: bool
    weights: Path | None = None


def calibrate(
    task: Task,
    sequences: Sequence[Ids],
    folder: Path,
    workers: int,
    progress: Progress = SILENT,
    *,
    likelihood: bool = False,
) -> Calibrated:
    """Choose codes for the tensors of `task` by the token ids `sequences` [S], in `folder`.

    With `likelihood`, the result says how well the model predicts them, unless an earlier run was
    killed later than that. What is complete in `folder` is kept. Raises `CheckpointError` for
    activations that are not finite.
    """
    store = Store(folder)
    config = task.checkpoint.config
    stages = [f"layer-{index}" for index in range(config.num_hidden_layers)]
    total = len(stages) + 1
    rotary = rotary_embedding(config)
    done = len(store.finished)
    hidden = _from_store(store) if done else embed(task.checkpoint, sequences)
    for index, name in enumerate(stages[done:], start=done):
        progress.update(f"calibrating layer {index}", index, total)
        layer = next(decoder_layers(task.checkpoint, start=index))
        inputs = collect_layer(
            layer,
            index,
            hidden,
            rotary,
            config,
            correlates=task.quantizer.correlates,
            weights=_weights(task, str(index)),
        )
        del layer  # its float32 weights and its codes need not be in memory together
        stage = _quantize_layer(task, name, index, inputs, workers)
        store.put(stage, [x[0].numpy() for x in hidden])
    nll = None
    if HEAD not in store.finished:
        nll = mean_nll(task.checkpoint, sequences, hidden) if likelihood else None
        progress.update("calibrating the head", total - 1, total)
        store.put(_quantize_head(task, hidden, workers), [])
    return replace(store.result(), nll=nll)


def mean_nll(checkpoint: Checkpoint, sequences: Sequence[Ids], hidden: Sequence[Tensor]) -> float:
    """Return the mean negative log-likelihood of a token, in nats, at the end of some of
    `sequences` [S], whose states after the last layer are `hidden` [1, S, H]."""
    some = range(0, len(sequences), max(1, len(sequences) // _PREDICTED[0]))
    ends = [min(_PREDICTED[1], len(sequences[i]) - 1) for i in some]
    with torch.inference_mode():
        states = [hidden[i][:, -end - 1 : -1] for i, end in zip(some, ends, strict=True)]
        found = []
        for index, end, logits in zip(some, ends, read_out(checkpoint, states), strict=True):
            following = torch.from_numpy(sequences[index][len(sequences[index]) - end :])
            found.append(torch.nn.functional.cross_entropy(torch.from_numpy(logits), following))
    return float(torch.stack(found).mean())


def _from_store(store: Store) -> list[Tensor]:
    return [torch.from_numpy(state)[None] for state in store.hidden()]


def _weights(task: Task, stage: str) -> dict[str, Float32] | None:
    """Return how much each token counts, by matrix, in a layer or the head."""
    if task.weights is None:
        return None
    return {name: seen.tokens for name, seen in seen_by(task.weights, stage).items()}


def _quantize_layer(
    task: Task, name: str, index: int, inputs: Mapping[str, Inputs], workers: int
) -> Stage:
    prefix = f"model.layers.{index}."
    exponents: dict[str, Exponents] = {}
    if task.rescales:
        for group in GROUPS:
            names = [f"{prefix}{member}.weight" for member in group.members]
            first = inputs[group.members[0]]
            exponents |= _exponents(task, prefix + group.scaled, names, first)
    scales = ChannelScales(exponents)
    matrices: dict[str, Quantized] = {}
    for members in _sharing(task):
        names = [f"{prefix}{member}.weight" for member in members]
        matrices |= _quantize(task, names, scales, inputs[members[0]], workers)
    return Stage(name, matrices, exponents)


def _sharing(task: Task) -> Sequence[tuple[str, ...]]:
    """Return the members of a layer whose inputs are one object, together."""
    return [group.members for group in GROUPS] if task.weights is None else [(m,) for m in MEMBERS]


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
    config = task.checkpoint.config
    return {scaled: group_exponents(config, scaled, rows, inputs.squares, storage)}


def _sample(tensors: Sequence[LazyTensor]) -> Float32:
    """Return rows [R, K] spread evenly over `tensors`."""
    total = sum(tensor.shape[0] for tensor in tensors)
    found = []
    for tensor in tensors:
        share = max(1, SAMPLE * tensor.shape[0] // total)
        picked = spread(tensor.shape[0], share)
        found += [_finite(tensor, int(row), int(row) + 1) for row in picked]
    return np.concatenate(found)


def _quantize_head(task: Task, hidden: Sequence[Tensor], workers: int) -> Stage:
    """Quantize the head by what it reads: the final states, normalized."""
    config = task.checkpoint.config
    tied = config.tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    if name not in task.storages:
        return Stage(HEAD, {}, {})
    weights = _weights(task, HEAD)
    collector = Collector(
        config.hidden_size,
        correlates=task.quantizer.correlates,
        weights=weights[HEAD] if weights else None,
    )
    with torch.inference_mode():
        for state in hidden:
            (normed,) = final_norm(task.checkpoint, [state])
            collector.add(normed.numpy())
    if not collector.finite:
        raise not_finite("the head reads NaN or infinity from the calibration's text")
    inputs = collector.inputs()
    exponents: dict[str, Exponents] = {}
    if task.rescales and not tied:
        exponents = _exponents(task, "model.norm", [name], inputs)
    matrices = _quantize(task, [name], ChannelScales(exponents), inputs, workers)
    return Stage(HEAD, matrices, exponents)


def _quantize(
    task: Task, names: Sequence[str], scales: ChannelScales, inputs: Inputs, workers: int
) -> dict[str, Quantized]:
    """Return the tensors `names`, which share `inputs`, quantized after `scales` are folded in; the
    codes are packed."""
    wanted = [name for name in names if name in task.storages]
    if not wanted:
        return {}
    folded = FoldedCheckpoint(task.checkpoint, scales)
    factors = scales.inputs(names[0].removesuffix(".weight"), task.checkpoint.config)
    quantizer = task.quantizer.with_inputs(inputs if factors is None else inputs.scaled(factors))
    quantize = partial(
        _all_rows, quantizer=quantizer, workers=workers, by_column=task.quantizer.correlates
    )
    return {name: quantize(folded.tensor(name), storage=task.storages[name]) for name in wanted}


def _all_rows(
    tensor: LazyTensor, quantizer: Quantizer, storage: Blocks, workers: int, *, by_column: bool
) -> Quantized:
    rows, columns = tensor.shape
    step = max(_ROWS if by_column else 1, _VALUES // columns)
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def quantize(part: tuple[int, int]) -> Quantized:
        found = quantizer.quantize(_finite(tensor, *part), storage)
        return replace(found, codes=pack(found.codes, storage.bits))

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
        raise damaged_rows(tensor.name, start, stop)
    return rows
