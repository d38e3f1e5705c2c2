"""Finds the tensor of a package that is not its rounded original, and shows it in the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint, modules_holding
from llama_onnx.exporter.formats.tensor import BlockCodes, Bounds, Float32, LazyTensor
from llama_onnx.exporter.graph.names import matrix_names
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.parity.bisect.values import module_of, scope_of
from llama_onnx.exporter.parity.measure.weights import (
    Mean,
    block_errors,
    block_means,
    in_chunks,
    original_of,
    quantizer_of,
    steps_apart,
)

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

_SHOWN = 32  # most rows, and columns, that a probe shows


@dataclass(frozen=True)
class Limits:
    """The limits in `thresholds.csv`; infinite if it has none."""

    steps: float = np.inf
    block_maximum: float = np.inf
    block_rms: float = np.inf
    matrix_rms: float = np.inf


@dataclass(frozen=True)
class WrongWeights:
    """`count` weights of `tensor` [R, K] (or [K], R = 1) that are too far from their originals.

    `rows` [R] and `columns` [K] mark those that have any. `place` is the index of the first one,
    `found` and `original` are its values. `limits` are those that they exceed.
    """

    tensor: str
    codes: BlockCodes | None
    count: int
    rows: Mask
    columns: Mask
    place: tuple[int, ...]
    found: float
    original: float
    limits: Limits


def find_wrong_weights(
    package: PackageCheckpoint, original: Checkpoint, limits: Limits
) -> WrongWeights | None:
    """Return the wrong weights of the first tensor that has any, from the embedding to the head."""
    for name in package.config.tensor_shapes():
        if wrong := _wrong_in(name, package, original, limits):
            return wrong
    return None


def _wrong_in(
    name: str, package: PackageCheckpoint, checkpoint: Checkpoint, limits: Limits
) -> WrongWeights | None:
    tensor, original = package.tensor(name), original_of(name, package, checkpoint)
    quantizer = quantizer_of(package.path)
    rows: list[Mask] = []
    columns = np.zeros(tensor.shape[-1], bool)
    count, first, matrix = 0, None, Mean()
    for found, expected, bounds in in_chunks(tensor, original, own_ranges=quantizer != "rtn"):
        wrong = _wrong_cells(found, expected, bounds, tensor, original, limits, quantizer)
        if bounds is not None:
            matrix.add(block_means(found, expected, tensor, bounds))
        if wrong.any() and first is None:
            place = np.unravel_index(wrong.argmax(), wrong.shape)
            start = sum(len(part) for part in rows) if wrong.ndim == 2 else 0
            index = tuple(int(i) for i in place)
            first = (
                (index[0] + start, *index[1:]),
                float(found[place]),
                float(expected[place]),
            )
        count += int(wrong.sum())
        flat = wrong.reshape(-1, wrong.shape[-1])
        rows.append(np.asarray(flat.any(axis=1)))
        columns[: flat.shape[-1]] |= flat.any(axis=0)
    if first is not None:
        return WrongWeights(
            name, tensor.codes, count, np.concatenate(rows), columns, *first, limits
        )
    stricter = replace(limits, block_rms=limits.matrix_rms)
    too_far = matrix.count > 0 and not math.sqrt(matrix.value) <= limits.matrix_rms
    if too_far and stricter != limits:
        # No block is wrong by itself: those are shown that exceed what the matrix may have.
        return _wrong_in(name, package, checkpoint, stricter)
    return None


def _wrong_cells(
    found: Float32,
    expected: Float32,
    bounds: Bounds | None,
    tensor: LazyTensor,
    original: LazyTensor,
    limits: Limits,
    quantizer: str,
) -> Mask:
    steps = steps_apart(found, expected, tensor, original, bounds, quantizer)
    wrong: Mask = ~(steps <= limits.steps)
    if bounds is None:
        blocks = ~(block_errors(found, expected, tensor.codes) <= limits.block_maximum)
    else:
        means = block_means(found, expected, tensor, bounds)
        blocks = ~(np.sqrt(means) <= limits.block_rms)
    if tensor.codes:
        wrong |= np.repeat(blocks, tensor.codes.block_size, axis=1)[:, : wrong.shape[1]]
    return wrong


@dataclass(frozen=True)
class Probe:
    """The nodes that read a tensor, inputs that make its weights appear in `output`, and the
    original weights expected there (NaN elsewhere)."""

    nodes: tuple[ir.Node, ...]
    inputs: dict[str, Array]
    output: str
    expected: Array


def probe(
    model: ir.Model,
    wrong: WrongWeights,
    package: PackageCheckpoint,
    checkpoint: Checkpoint,
) -> Probe:
    """Build the probe that shows the `wrong` weights.

    One-hot inputs show the columns of a matrix, ids the rows of an embedding, ones a norm's gain.
    """
    nodes, first_row = _readers(model, wrong.tensor.removesuffix(".weight"), package)
    inputs, output = _ends(model, nodes)
    original = original_of(wrong.tensor, package, checkpoint)
    if len(original.shape) == 1:
        gain = original.rows(0, len(wrong.columns)) / np.sqrt(1 + package.config.rms_norm_eps)
        zeros = {name: np.zeros((1, 1, len(gain)), np.float32) for name in inputs}
        ones = {inputs[0]: np.ones((1, 1, len(gain)), np.float32)}
        return Probe(nodes, zeros | ones, output, np.where(wrong.columns, gain, np.nan)[None, None])
    rows = np.flatnonzero(wrong.rows)[:_SHOWN]
    tensor = package.tensor(wrong.tensor)
    seen, right = (np.concatenate([t.rows(int(r), int(r) + 1) for r in rows])
                   for t in (tensor, original))  # fmt: skip
    ranges = _ranges(package, tensor, rows)
    quantizer = quantizer_of(package.path)
    bad = _wrong_cells(seen, right, ranges, tensor, original, wrong.limits, quantizer)
    shown = np.where(bad, right, np.nan)  # [rows, K]
    if module_of(nodes[0]) == "embed_tokens":
        return Probe(nodes, {inputs[0]: rows[None]}, output, shown[None])
    columns = np.flatnonzero(bad.any(axis=0))[:_SHOWN]
    one_hot = np.eye(tensor.shape[1], dtype=np.float32)[columns][None]  # [1, columns, K]
    expected = np.full((1, len(columns), _rows_of(nodes[-1])), np.nan)
    expected[0][:, first_row + rows] = shown[:, columns].T
    return Probe(nodes, {inputs[0]: one_hot}, output, expected)


def _ranges(
    package: PackageCheckpoint, tensor: LazyTensor, rows: npt.NDArray[np.intp]
) -> Bounds | None:
    """Return the ranges of the blocks of `rows`, if a calibrated quantizer chose them."""
    if tensor.bounds is None or quantizer_of(package.path) == "rtn":
        return None
    found = [tensor.bounds(int(row), int(row) + 1) for row in rows]
    known = [bounds for bounds in found if bounds is not None]
    if len(known) < len(found):
        return None
    low, high = (np.concatenate(ends) for ends in zip(*known, strict=True))
    return low, high


def _readers(
    model: ir.Model, name: str, package: PackageCheckpoint
) -> tuple[tuple[ir.Node, ...], int]:
    """Return the nodes of the module that reads tensor `name`, and the tensor's first row there."""
    shapes = package.config.tensor_shapes()
    for module, parts in modules_holding(name):
        stored = set(matrix_names(module)) & set(model.graph.initializers)
        readers = [n for n in model.graph if any(v and v.name in stored for v in n.inputs)]
        if readers:
            scope = scope_of(readers[0])
            nodes = tuple(node for node in model.graph if scope_of(node) == scope)
            before = parts[: parts.index(name)]
            return nodes, sum(shapes[f"{part}.weight"][0] for part in before)
    raise AssertionError(f"{name} was read from the package, so it is in its graph")


def _ends(model: ir.Model, nodes: Sequence[ir.Node]) -> tuple[list[str], str]:
    """Return what `nodes` read from other nodes, and the first result that other nodes read."""
    made = [value for node in nodes for value in node.outputs]
    read = [v for node in nodes for v in node.inputs if v is not None and v not in made]
    taken = [str(v.name) for v in read if v.name not in model.graph.initializers]
    given = [v for v in made if v in model.graph.outputs
             or any(user not in nodes for user, _ in v.uses())]  # fmt: skip
    return list(dict.fromkeys(taken)), str(given[0].name)


def _rows_of(node: ir.Node) -> int:
    """Return the rows of the matrix that `node` multiplies by: its output's channels."""
    shape = node.outputs[0].shape
    assert shape is not None and isinstance(shape[-1], int), "the exporter writes every shape"
    return shape[-1]
