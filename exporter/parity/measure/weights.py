"""Compares each of the package's weights with the original weight that it was rounded from.

Logits on a few prompts cannot tell a small model that four bits hurt from one whose blocks are
mixed up; the distance of each weight from its original can.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.formats.tensor import BlockCodes, Bounds, Float32, LazyTensor
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.stream import ordered_map
from llama_onnx.exporter.quantize.registry import CORRELATING
from llama_onnx.targets.package import MANIFEST
from llama_onnx.targets.progress import Progress

_CHUNK_VALUES = 1 << 20  # read at a time
_PIECE_VALUES = 1 << 16  # compared at a time: they stay in the processor's cache
_TIE = 1e-5  # magnitudes this close may have been equal, or in reverse order, when rounded
_SMALLEST = np.float32(1e-30)  # below it a float32 has fewer digits


@dataclass(frozen=True)
class Worst:
    """The largest `value` of a metric, and the `tensor` that has it."""

    value: float
    tensor: str


@dataclass(frozen=True)
class WeightError:
    """How far the weights are from their originals; None where a metric does not apply.

    `steps` is the distance of the farthest weight. A step is the distance between neighboring
    values at the original: of float16 or bfloat16 numbers, or the largest magnitude of the
    original's block over 2^(bits-1). A weight stored in float32, or with the codes of the original,
    must be equal: its distance is 0 or infinite.

    A calibrated quantizer chooses the range of each block, and may cut off its extremes. There a
    step is that of the block's own codes, and the distance is that from the nearest value within
    its range: at most half a step if each weight was rounded to the nearest code. A quantizer of
    `CORRELATING` makes up for the errors of one column in others. An error is as large as the steps
    of the column that it comes from, so `steps` counts the largest steps of the weight's row.

    `block_rms` and `matrix_rms` are the root mean square, over a block and over a matrix, of the
    distances in steps of the block's own codes: rounding to nearest has 0.29, a block that is not
    the original's about a third of its codes.

    Rounding to nearest keeps the value of largest magnitude of every block. `block_maximum` is the
    largest relative error of these values: `steps` would not show a scale that is slightly wrong.
    """

    steps: Worst
    block_maximum: Worst | None = None
    block_rms: Worst | None = None
    matrix_rms: Worst | None = None


@dataclass(frozen=True)
class _Distance:
    """The figures of one tensor; see `WeightError`."""

    steps: float
    block_maximum: float | None = None
    block_rms: float | None = None
    matrix_rms: float | None = None


def compare_weights(
    package: PackageCheckpoint, original: Checkpoint, progress: Progress
) -> WeightError:
    """Compare every tensor of `package` with that of `original`, a few rows at a time, and one
    tensor for each processor at the same time."""
    names = list(package.config.tensor_shapes())
    quantizer = quantizer_of(package.path)
    found = dict[str, _Distance]()

    def compared(name: str) -> _Distance:
        source = original_of(name, package, original)
        return _compare(package.tensor(name), source, quantizer)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        results = ordered_map(compared, names, pool, 2 * workers)
        for index, (name, distance) in enumerate(zip(names, results, strict=True)):
            found[name] = distance
            progress.update("weights", index + 1, len(names))
    steps = _worst({name: distance.steps for name, distance in found.items()})
    assert steps is not None, "a model has tensors"
    others = (
        _worst({name: getattr(distance, metric) for name, distance in found.items()})
        for metric in ("block_maximum", "block_rms", "matrix_rms")
    )
    return WeightError(steps, *others)


def _compare(found: LazyTensor, source: LazyTensor, quantizer: str) -> _Distance:
    """Return the figures of `found`."""
    to_nearest = quantizer == "rtn"
    farthest, largest, blocks, matrix = [0.0], [0.0], [0.0], Mean()
    for rows, expected, bounds in in_chunks(found, source, own_ranges=not to_nearest):
        farthest.append(_farthest(rows, expected, found, source, bounds, quantizer))
        if to_nearest:
            largest.append(float(block_errors(rows, expected, found.codes).max(initial=0)))
        elif bounds is not None:
            means = block_means(rows, expected, found, bounds)
            blocks.append(float(means.max()))
            matrix.add(means)
    # A NaN is the worst of all.
    steps = float(np.max(farthest))
    if to_nearest:
        return _Distance(steps, block_maximum=float(np.max(largest)) if found.codes else None)
    if not matrix.count:
        return _Distance(steps)
    return _Distance(steps, block_rms=math.sqrt(np.max(blocks)), matrix_rms=math.sqrt(matrix.value))


@dataclass
class Mean:
    """The mean of values that are added a few at a time, as `total` over `count`."""

    total: float = 0.0
    count: int = 0

    def add(self, values: Float32) -> None:
        """Add all of `values`."""
        self.total += float(values.sum(dtype=np.float64))
        self.count += values.size

    @property
    def value(self) -> float:
        """The mean of all values so far; there must be one."""
        return self.total / self.count


def original_of(name: str, package: PackageCheckpoint, original: Checkpoint) -> LazyTensor:
    """Return the tensor of `original` that tensor `name` of `package` was made from: with its codes
    only if the package may have kept them, else as the values that they represent."""
    # A package stores tied weights once, but its graph reads them twice.
    tied = name == "lm_head.weight" and original.config.tie_word_embeddings
    source = original.tensor("model.embed_tokens.weight" if tied else name)
    return source if package.keeps_codes else replace(source, codes=None)


def quantizer_of(package: Path) -> str:
    """Return the quantizer named in the package's manifest; "rtn" if it names none."""
    file = package / MANIFEST
    recipe = read_json(file).get("recipe", {}) if file.is_file() else {}
    return str(recipe.get("quantizer", "rtn"))


def same_codes(found: LazyTensor, original: LazyTensor) -> bool:
    """Return whether `found` has the codes of `original`, so that both must be equal."""
    return bool(found.codes and original.codes and found.codes.bits == original.codes.bits)


def in_chunks(
    found: LazyTensor, original: LazyTensor, *, own_ranges: bool
) -> Iterator[tuple[Float32, Float32, Bounds | None]]:
    """Yield the same rows of both, a few at a time; with `own_ranges`, also the ranges of the
    blocks of `found`, unless both have the same codes."""
    ranges = found.bounds if own_ranges and not same_codes(found, original) else None
    rows, width = found.shape[0], max(1, int(np.prod(found.shape[1:])))
    chunk, piece = max(1, _CHUNK_VALUES // width), max(1, _PIECE_VALUES // width)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        bounds = ranges(start, stop) if ranges else None
        ours, theirs = found.rows(start, stop), original.rows(start, stop)
        for first in range(0, stop - start, piece):
            part = slice(first, first + piece)
            limits = (bounds[0][part], bounds[1][part]) if bounds else None
            yield ours[part], theirs[part], limits


def steps_apart(
    rows: Float32,
    expected: Float32,
    found: LazyTensor,
    original: LazyTensor,
    bounds: Bounds | None = None,
    quantizer: str = "rtn",
) -> Float32:
    """Return the distance of each weight of `found` from its original, in steps; see `WeightError`.

    `rows` and `expected` are the same rows of both, `bounds` the ranges of their blocks.
    """
    if bounds is not None:
        assert found.codes is not None, "only blocks of codes have ranges"
        ends = (*bounds, _steps_of(bounds, found.codes, quantizer))
        low, high, step = (_at_each_weight(end, found.codes, expected.shape[1]) for end in ends)
        expected = np.clip(expected, low, high)
    elif same_codes(found, original):
        step = np.zeros_like(expected)
    else:
        step = found.step(expected)
    distance = np.abs(rows - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = distance / step
    return np.where(distance == 0, np.float32(0), steps)


def _steps_of(bounds: Bounds, codes: BlockCodes, quantizer: str) -> Float32:
    """Return the step [R, blocks] that the distances of each block are counted in; see
    `WeightError`."""
    low, high = bounds
    own: Float32 = (high - low) / np.float32(2**codes.bits - 1)
    if quantizer not in CORRELATING:
        return own
    return np.broadcast_to(own.max(axis=1, keepdims=True), own.shape)


def block_means(rows: Float32, expected: Float32, found: LazyTensor, bounds: Bounds) -> Float32:
    """Return the mean square of each block's distances, in steps of its own codes, [R, blocks].

    What fills up the last block of a row does not count.
    """
    assert found.codes is not None, "only blocks of codes have ranges"
    low, high = bounds
    ours, theirs = _in_blocks(rows, found.codes), _in_blocks(expected, found.codes)
    distance = ours - np.clip(theirs, low[..., None], high[..., None])
    step = (high - low) / np.float32(2**found.codes.bits - 1)
    starts = found.codes.block_size * np.arange(low.shape[1])
    counts = np.minimum(found.codes.block_size, expected.shape[1] - starts).astype(np.float32)
    squares = np.einsum("rbk,rbk->rb", distance, distance) / counts
    with np.errstate(divide="ignore", invalid="ignore"):
        means = squares / np.square(step)
    return np.where(squares == 0, np.float32(0), means)


def _farthest(
    rows: Float32,
    expected: Float32,
    found: LazyTensor,
    original: LazyTensor,
    bounds: Bounds | None,
    quantizer: str,
) -> float:
    """Return the largest of `steps_apart`. The weights of a block share a step, so that only its
    largest distance is divided."""
    codes = found.codes
    exact = bounds is None and same_codes(found, original)
    if codes is None or exact or expected.shape[1] % codes.block_size:
        return float(steps_apart(rows, expected, found, original, bounds, quantizer).max())
    ours, theirs = _in_blocks(rows, codes), _in_blocks(expected, codes)
    if bounds is not None:
        low, high = bounds
        step = _steps_of(bounds, codes, quantizer)
        theirs = np.clip(theirs, low[..., None], high[..., None])
    else:
        step = _by_block(np.maximum, np.abs(theirs)) / np.float32(2 ** (codes.bits - 1))
    largest = _by_block(np.maximum, np.abs(ours - theirs))
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = largest / step
    return float(np.where(largest == 0, np.float32(0), steps).max())


def _in_blocks(values: Float32, codes: BlockCodes) -> Float32:
    """Return `values` [R, K] as [R, blocks, block size], the last block filled up with zeros."""
    missing = -values.shape[1] % codes.block_size
    whole = np.pad(values, ((0, 0), (0, missing))) if missing else values
    return whole.reshape(len(values), -1, codes.block_size)


def _at_each_weight(blocks: Float32, codes: BlockCodes, columns: int) -> Float32:
    """Return values of blocks [R, blocks] for each weight, [R, columns]."""
    return np.repeat(blocks, codes.block_size, axis=1)[:, :columns]


def block_errors(found: Float32, expected: Float32, codes: BlockCodes | None) -> Float32:
    """Return the relative error of each block's value of largest magnitude, [R, blocks]; of several
    such values the smallest error counts. [R, 0] for a tensor without blocks."""
    if codes is None:
        return np.zeros((len(found), 0), np.float32)
    ours, theirs = _in_blocks(found, codes), _in_blocks(expected, codes)
    magnitudes = np.abs(theirs)
    distance = np.abs(ours - theirs)
    largest = _by_block(np.maximum, magnitudes)
    is_largest = magnitudes >= (largest * np.float32(1 - _TIE))[..., None]
    nearest = _by_block(np.minimum, np.where(is_largest, distance, np.float32(np.inf)))
    errors: Float32 = (nearest / np.maximum(largest, _SMALLEST)).astype(np.float32, copy=False)
    return errors


def _by_block(reduce: np.ufunc, values: Float32) -> Float32:
    """Return `reduce` of each block of `values` [R, blocks, block size]: twice as fast along the
    first axis as along a short last one."""
    return np.asarray(reduce.reduce(np.ascontiguousarray(values.transpose(2, 0, 1)), axis=0))


def _worst(values: Mapping[str, float | None]) -> Worst | None:
    """Return the first NaN, or else the largest of `values`; None if there are none."""
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return None
    worst = next((n for n, v in known.items() if v != v), max(known, key=known.__getitem__))
    return Worst(known[worst], worst)
