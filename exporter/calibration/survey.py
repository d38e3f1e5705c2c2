"""Predicts what each way of storing a matrix costs, from what a text's tokens show of it.

A matrix's loss is the model's mean KL divergence from the original, to the second order (see
`backward`), with the error of each weight taken to be independent of the others: the diagonal of
the Fisher information. Codes are rounded to nearest on the best grid for a sample of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.calibration.backward import Seen
from llama_onnx.exporter.calibration.groups import GROUPS
from llama_onnx.exporter.calibration.scaling import group_exponents, spread
from llama_onnx.exporter.calibration.token_weights import (
    HEAD,
    chances_of_rows,
    embedding_gradients,
    seen_by,
)
from llama_onnx.exporter.checkpoints.folded import FoldedCheckpoint
from llama_onnx.exporter.formats.tensor import Float32, LazyTensor
from llama_onnx.exporter.model.channel_scales import ChannelScales, Exponents
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.model.storage import RowBlocks
from llama_onnx.exporter.quantize.allocate import Losses
from llama_onnx.exporter.quantize.ranges import dequantized, nearest_codes, search_grid
from llama_onnx.exporter.reference.walk import Ids
from llama_onnx.targets.progress import SILENT, Progress

ERROR_FEEDBACK = 0.75
"""Loss after GPTQ relative to that of codes rounded to nearest, measured: .74 to .79 for a 135M
model at 4.5 to 6.3 bits."""

_SAMPLE = 256  # rows of each matrix that are quantized
_SMALLEST = np.float32(1e-30)
_CHUNK_ROWS = 4096  # of the head, at a time


@dataclass(frozen=True)
class SurveyTask:
    """What to survey in `checkpoint`: the storages to choose from for each tensor. `rescales`:
    channels may be rescaled first; `weights` is the folder that `weigh` filled for `sequences`."""

    checkpoint: Checkpoint
    storages: Mapping[str, Sequence[RowBlocks]]
    rescales: bool
    weights: Path
    sequences: Sequence[Ids]


def survey(task: SurveyTask, progress: Progress = SILENT) -> Losses:
    """Return the predicted loss of each storage of each tensor in `task`."""
    found: dict[str, Mapping[RowBlocks, float]] = {}
    count = task.checkpoint.config.num_hidden_layers
    for index in range(count):
        progress.update(f"comparing storages, layer {index}", index, count)
        found |= _survey_layer(task, index, seen_by(task.weights, str(index)))
    tied = task.checkpoint.config.tie_word_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    if name in task.storages:
        found[name] = _survey_head(task, name, seen_by(task.weights, HEAD)[HEAD], tied=tied)
    return found


def _survey_layer(
    task: SurveyTask, index: int, seen: Mapping[str, Seen]
) -> dict[str, Mapping[RowBlocks, float]]:
    prefix, config = f"model.layers.{index}.", task.checkpoint.config
    scales = _channel_scales(task, prefix, seen)
    folded = FoldedCheckpoint(task.checkpoint, scales)
    found: dict[str, Mapping[RowBlocks, float]] = {}
    for member, one in seen.items():
        name = f"{prefix}{member}.weight"
        if name not in task.storages:
            continue
        inputs, outputs = scales.inputs(prefix + member, config), scales.outputs(prefix + member)
        weights = one.weighted if inputs is None else one.weighted / inputs**2
        tensor = folded.tensor(name)
        rows = _sample(tensor)
        factors = np.ones(tensor.shape[0], np.float32) if outputs is None else outputs**2
        picked = factors[_picked(tensor)]
        # The mean over the outputs, of which a sample is quantized.
        found[name] = {
            storage: _loss(rows, weights, picked, storage) / (2 * len(rows))
            for storage in task.storages[name]
        }
    return found


def _channel_scales(task: SurveyTask, prefix: str, seen: Mapping[str, Seen]) -> ChannelScales:
    """Return the channel scales that the layer will have, or nearly."""
    config = task.checkpoint.config
    exponents: dict[str, Exponents] = {}
    for group in GROUPS if task.rescales else ():
        names = [f"{prefix}{member}.weight" for member in group.members]
        if not all(name in task.storages for name in names):
            continue
        rows = np.concatenate([_sample(task.checkpoint.tensor(name)) for name in names])
        first, storage = seen[group.members[0]], task.storages[names[0]][0]
        squares = first.weighted / max(first.tokens.mean(), _SMALLEST)
        scaled = prefix + group.scaled
        exponents[scaled] = group_exponents(config, scaled, rows, squares, storage)
    return ChannelScales(exponents)


def _loss(rows: Float32, weights: Float32, factors: Float32, storage: RowBlocks) -> float:
    """Return the sum over `rows` [R, K] of their errors, each input weighted by `weights` [K] and
    each row by `factors` [R]."""
    error = _errors(rows, weights, storage)
    return float(np.einsum("rk,rk,k,r->", error, error, weights, factors, dtype=np.float64))


def _errors(rows: Float32, weights: Float32, storage: RowBlocks) -> Float32:
    grid = search_grid(rows, weights, storage)
    return dequantized(nearest_codes(rows, grid, storage), grid, rows.shape[1]) - rows


def _survey_head(
    task: SurveyTask, name: str, seen: Seen, *, tied: bool
) -> Mapping[RowBlocks, float]:
    """Return the losses of the head, whose rows differ by how often their tokens are predicted; of
    one that is tied, with those of the embedding, which differ by how often they are read."""
    tensor = task.checkpoint.tensor(name)
    vocabulary, hidden = tensor.shape
    chances = chances_of_rows(task.weights)
    reads = np.zeros(vocabulary)
    if tied:
        ids = np.concatenate(list(task.sequences))
        np.add.at(reads, ids, embedding_gradients(task.weights) / (hidden * len(ids)))
    found = dict.fromkeys(task.storages[name], 0.0)
    for start in range(0, vocabulary, _CHUNK_ROWS):
        stop = min(start + _CHUNK_ROWS, vocabulary)
        rows = tensor.rows(start, stop)
        for storage in found:
            squares = np.square(_errors(rows, seen.squares, storage))  # [rows, H]
            loss = (squares @ seen.squares) @ chances[start:stop]
            loss += squares.sum(axis=1) @ reads[start:stop]
            found[storage] += float(loss) / 2
    return found


def _sample(tensor: LazyTensor) -> Float32:
    return np.concatenate([tensor.rows(int(i), int(i) + 1) for i in _picked(tensor)])


def _picked(tensor: LazyTensor) -> npt.NDArray[np.int64]:
    return spread(tensor.shape[0], _SAMPLE)
