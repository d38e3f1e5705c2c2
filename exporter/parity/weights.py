"""Are the package's weights the original ones, rounded? Weight by weight, whatever the prompts.

Logits on a few prompts cannot tell a small model that four bits hurt from one whose blocks were
mixed up; the distance of each weight from its original can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llama_onnx.exporter.checkpoints.base import Checkpoint, Float32, LazyTensor
from llama_onnx.exporter.checkpoints.package import PackageCheckpoint

_CHUNK_VALUES = 1 << 20


@dataclass(frozen=True)
class WeightError:
    """The weight that lies farthest from its original, in steps, and the tensor it stands in.

    A step is the distance of neighbouring values where the original lies: of float16 numbers, or
    the largest magnitude of the original's block over 2^(bits-1). Stored in float32, or as codes
    that the original has already, a weight has to be equal: the distance is 0 or infinite.
    """

    steps: float
    tensor: str


def compare_weights(
    package: PackageCheckpoint, reference: Checkpoint, progress: Callable[[int, int], None]
) -> WeightError:
    """Compare every tensor of `package` with `reference`'s, a few rows of each at a time."""
    names = list(package.config.tensor_shapes())
    worst = WeightError(0.0, names[0])
    for index, name in enumerate(names):
        # A package stores tied weights once, but its graph reads them twice.
        tied = name == "lm_head.weight" and reference.config.tie_word_embeddings
        original = reference.tensor("model.embed_tokens.weight" if tied else name)
        steps = _distance(package.tensor(name), original)
        if not steps <= worst.steps:  # a NaN is the worst of all
            worst = WeightError(steps, name)
        progress(index + 1, len(names))
    return worst


def _distance(found: LazyTensor, original: LazyTensor) -> float:
    rows = found.shape[0]
    codes, codes_before = found.dtype.partition("/")[0], original.dtype.partition("/")[0]
    taken_over = codes == codes_before and codes.startswith("INT")
    chunk = max(1, _CHUNK_VALUES // max(1, int(np.prod(found.shape[1:]))))
    farthest = [0.0]
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        expected = original.rows(start, stop)
        distance = np.abs(found.rows(start, stop) - expected)
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = distance / (0 if taken_over else _steps(expected, found.dtype))
        farthest.append(float(np.where(distance == 0, 0, steps).max()))
    return float(np.max(farthest))


def _steps(values: Float32, dtype: str) -> Float32:
    """The step at each of `values` [R, K] (or [K]) when stored as `dtype`; see `WeightError`."""
    if dtype == "F32":
        return np.zeros_like(values)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return np.spacing(np.abs(values).astype(np.float16)).astype(np.float32)
    bits, block = (int(number) for number in dtype.removeprefix("INT").split("/"))
    columns = values.shape[1]
    padded = np.pad(np.abs(values), ((0, 0), (0, -columns % block)))
    largest = padded.reshape(len(values), -1, block).max(axis=2)  # [R, blocks]
    return np.repeat(largest / 2 ** (bits - 1), block, axis=1)[:, :columns]
