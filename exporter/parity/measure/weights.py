"""Compares each of the package's weights with the original weight that it was rounded from.

Logits on a few prompts cannot tell a small model that four bits hurt from one whose blocks are
mixed up; the distance of each weight from its original can.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.formats.tensor import BlockCodes, Bounds, Float32, LazyTensor
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.stream import ordered_map
from llama_onnx.targets.package import MANIFEST
from llama_onnx.targets.progress import Progress

_CHUNK_VALUES = 1 << 20  # read at a time
_PIECE_VALUES = 1 << 16  # compared at a time: they stay in the processor's cache
_TIE = 1e-5  # magnitudes this close may have been equal, or in reverse order, when rounded
_SMALLEST = np.float32(1e-30)  # below it a float32 has fewer digits


@dataclass(frozen=True)
class WeightError:
    """The weight farthest from its original, in `steps`, and the `tensor` that has it.

    A step is the distance between neighboring values at the original: of float16 or bfloat16
    numbers, or the largest magnitude of the original's block over 2^(bits-1). A weight stored in
    float32, or with the codes of the original, must be equal: its distance is 0 or infinite.

    A calibrated quantizer chooses the range of each block, and may cut off its extremes. There a
    step is that of the block's own codes, and the distance is that from the nearest value within
    its range: at most half a step if each weight was rounded to the nearest code.

    Rounding to nearest keeps the value of largest magnitude of every block. `block_maximum` is the
    largest relative error of these values, and `block_tensor` has it: `steps` would not show a
    scale that is slightly wrong. Both are None without such blocks.
    """

    steps: float
    tensor: str
    block_maximum: float | None = None
    block_tensor: str | None = None


def compare_weights(
    package: PackageCheckpoint, original: Checkpoint, progress: Progress
) -> WeightError:
    """Compare every tensor of `package` with that of `original`, a few rows at a time, and one
    tensor for each processor at the same time."""
    names = list(package.config.tensor_shapes())
    to_nearest = quantizer_of(package.path) == "rtn"
    steps, blocks = {names[0]: 0.0}, dict[str, float]()

    def compared(name: str) -> tuple[float, float | None]:
        found, source = package.tensor(name), original_of(name, package, original)
        return _compare(found, source, to_nearest=to_nearest)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        results = ordered_map(compared, names, pool, 2 * workers)
        for index, (name, (farthest, largest)) in enumerate(zip(names, results, strict=True)):
            steps[name] = farthest
            if largest is not None:
                blocks[name] = largest
            progress.update("weights", index + 1, len(names))
    worst = _worst(steps)
    if not blocks:
        return WeightError(steps[worst], worst)
    scaled = _worst(blocks)
    return WeightError(steps[worst], worst, blocks[scaled], scaled)


def _compare(
    found: LazyTensor, source: LazyTensor, *, to_nearest: bool
) -> tuple[float, float | None]:
    """Return the largest distance in steps, and the largest error of a block's extreme value: None
    unless `found` has blocks that were rounded to nearest."""
    farthest, largest = [0.0], [0.0]
    for rows, expected, bounds in in_chunks(found, source, own_ranges=not to_nearest):
        farthest.append(_farthest(rows, expected, found, source, bounds))
        if to_nearest:
            largest.append(float(block_errors(rows, expected, found.codes).max(initial=0)))
    # A NaN is the worst of all.
    return float(np.max(farthest)), float(np.max(largest)) if to_nearest and found.codes else None


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
) -> Float32:
    """Return the distance of each weight of `found` from its original, in steps; see `WeightError`.

    `rows` and `expected` are the same rows of both, `bounds` the ranges of their blocks.
    """
    if bounds is not None:
        assert found.codes is not None, "only blocks of codes have ranges"
        low, high = (_at_each_weight(end, found.codes, expected.shape[1]) for end in bounds)
        step = (high - low) / np.float32(2**found.codes.bits - 1)
        expected = np.clip(expected, low, high)
    elif same_codes(found, original):
        step = np.zeros_like(expected)
    else:
        step = found.step(expected)
    distance = np.abs(rows - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = distance / step
    return np.where(distance == 0, np.float32(0), steps)


def _farthest(
    rows: Float32,
    expected: Float32,
    found: LazyTensor,
    original: LazyTensor,
    bounds: Bounds | None,
) -> float:
    """Return the largest of `steps_apart`. The weights of a block share a step, so that only its
    largest distance is divided."""
    codes = found.codes
    exact = bounds is None and same_codes(found, original)
    if codes is None or exact or expected.shape[1] % codes.block_size:
        return float(steps_apart(rows, expected, found, original, bounds).max())
    ours, theirs = _in_blocks(rows, codes), _in_blocks(expected, codes)
    if bounds is not None:
        low, high = bounds
        step = (high - low) / np.float32(2**codes.bits - 1)
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


def _worst(values: dict[str, float]) -> str:
    """Return the first name with a NaN, or else the name with the largest value."""
    return next((n for n, v in values.items() if v != v), max(values, key=values.__getitem__))
