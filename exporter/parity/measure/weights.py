"""Compares each of the package's weights with the original weight that it was rounded from.

Logits on a few prompts cannot tell a small model that four bits hurt from one whose blocks are
mixed up; the distance of each weight from its original can.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.formats.tensor import BlockCodes, Bounds, Float32, LazyTensor
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.targets.package import MANIFEST
from llama_onnx.targets.progress import Progress

_CHUNK_VALUES = 1 << 20
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
    """Compare every tensor of `package` with that of `original`, a few rows at a time."""
    names = list(package.config.tensor_shapes())
    to_nearest = quantizer_of(package.path) == "rtn"
    steps, blocks = {names[0]: 0.0}, dict[str, float]()
    for index, name in enumerate(names):
        found, source = package.tensor(name), original_of(name, package, original)
        farthest, largest = [0.0], [0.0]
        for rows, expected, bounds in in_chunks(found, source, own_ranges=not to_nearest):
            farthest.append(float(steps_apart(rows, expected, found, source, bounds).max()))
            if to_nearest:
                largest.append(float(block_errors(rows, expected, found.codes).max(initial=0)))
        steps[name] = float(np.max(farthest))  # a NaN is the worst of all
        if to_nearest and found.codes:
            blocks[name] = float(np.max(largest))
        progress.update("weights", index + 1, len(names))
    worst = _worst(steps)
    if not blocks:
        return WeightError(steps[worst], worst)
    scaled = _worst(blocks)
    return WeightError(steps[worst], worst, blocks[scaled], scaled)


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
    rows = found.shape[0]
    chunk = max(1, _CHUNK_VALUES // max(1, int(np.prod(found.shape[1:]))))
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        bounds = ranges(start, stop) if ranges else None
        yield found.rows(start, stop), original.rows(start, stop), bounds


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


def _at_each_weight(blocks: Float32, codes: BlockCodes, columns: int) -> Float32:
    """Return values of blocks [R, blocks] for each weight, [R, columns]."""
    return np.repeat(blocks, codes.block_size, axis=1)[:, :columns]


def block_errors(found: Float32, expected: Float32, codes: BlockCodes | None) -> Float32:
    """Return the relative error of each block's value of largest magnitude, [R, blocks]; of several
    such values the smallest error counts. [R, 0] for a tensor without blocks."""
    if codes is None:
        return np.zeros((len(found), 0), np.float32)
    block = codes.block_size
    padding = ((0, 0), (0, -expected.shape[1] % block))
    wide = np.pad(expected, padding).reshape(len(expected), -1, block)
    distance = np.abs(np.pad(found, padding).reshape(wide.shape) - wide)
    largest = np.abs(wide).max(axis=2)  # [R, blocks]
    is_largest = np.abs(wide) >= largest[..., None] * np.float32(1 - _TIE)
    nearest = np.where(is_largest, distance, np.inf).min(axis=2)
    errors: Float32 = nearest / np.maximum(largest, _SMALLEST)
    return errors


def _worst(values: dict[str, float]) -> str:
    """Return the first name with a NaN, or else the name with the largest value."""
    return next((n for n, v in values.items() if v != v), max(values, key=values.__getitem__))
