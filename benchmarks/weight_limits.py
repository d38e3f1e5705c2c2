"""How far a sound package's weights are from their originals, and how far those of a wrong one.

    python benchmarks/weight_limits.py CHECKPOINT PACKAGE ...

Each matrix is measured as `validate` does it, and once more with a fault in each of its whole
blocks: the codes of its neighbor, its own in reverse order, a zero point that is one off. Rows are
by bits and block size: the worst of the sound weights, the share of the wrong blocks with a larger
figure than the limit, and the least mean of a matrix that is wrong throughout. The limits are those
of runtime/measure/thresholds.csv. The embedding and the head, rounded to nearest, do not count.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from llama_onnx.exporter.formats.tensor import BlockCodes, Bounds, Float32, LazyTensor
from llama_onnx.exporter.parity.measure.open_subject import open_subject
from llama_onnx.exporter.parity.measure.weights import (
    block_means,
    in_chunks,
    original_of,
    quantizer_of,
    steps_apart,
)
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.runtime.measure.thresholds import thresholds

FAULTS = ("none", "codes of the neighbor", "codes in reverse", "zero point one off")


@dataclass(frozen=True)
class Figures:
    """Of one matrix with one fault: the farthest weight and the root mean square of each block, and
    that of the matrix."""

    steps: Float32
    block_rms: Float32
    matrix_rms: float


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("packages", type=Path, nargs="+")
    arguments = parser.parse_args()
    for package in arguments.packages:
        Console().print(_table(package, arguments.checkpoint))


def _table(package: Path, checkpoint: Path) -> Table:
    quantizer = quantizer_of(package)
    rows = thresholds("int4", "int8", "cpu", quantizer=quantizer)
    limits = {row.metric: row.limit for row in rows if row.measure == "weights"}
    table = Table("bits, block", "fault", *limits, title=f"{package.name} ({quantizer})")
    for (codes, fault), found in measured(package, checkpoint, quantizer).items():
        cells = []
        for metric, limit in limits.items():
            values = [getattr(one, metric) for one in found]
            beyond = np.mean([np.mean(value > limit) for value in values])
            text = f"{np.max([np.max(value) for value in values]):.2f} at most"
            if fault != "none" and metric == "matrix_rms":
                text = f"{np.min(values):.2f} at least"
            elif fault != "none":
                text = f"{beyond:.1%} beyond"
            cells.append(text)
        table.add_row(f"{codes.bits}, {codes.block_size}", fault, *cells)
    return table


def measured(
    package: Path, checkpoint: Path, quantizer: str
) -> dict[tuple[BlockCodes, str], list[Figures]]:
    """Return the figures of all matrices by the way they are stored, and by fault."""
    subject = open_subject(package, open_checkpoint(checkpoint))
    found = defaultdict[tuple[BlockCodes, str], list[Figures]](list)
    for name in subject.weights.config.tensor_shapes():
        tensor = subject.weights.tensor(name)
        if tensor.codes is None or ".layers." not in name:
            continue
        original = original_of(name, subject.weights, subject.rounded_from)
        for fault in FAULTS:
            found[tensor.codes, fault].append(_figures(tensor, original, fault, quantizer))
    return dict(sorted(found.items(), key=lambda one: (one[0][0].bits, one[0][0].block_size)))


def _figures(tensor: LazyTensor, original: LazyTensor, fault: str, quantizer: str) -> Figures:
    assert tensor.codes is not None, "the caller looked"
    size, steps, means = tensor.codes.block_size, [], []
    for rows, expected, bounds in in_chunks(tensor, original, own_ranges=True):
        assert bounds is not None, "matrices of a calibrated quantizer have ranges"
        wrong = _with_fault(rows, bounds, tensor.codes, fault)
        apart = steps_apart(wrong, expected, tensor, original, bounds, quantizer)
        starts = np.arange(0, apart.shape[1], size)
        whole = slice(None if fault == "none" else apart.shape[1] // size)
        steps.append(np.maximum.reduceat(apart, starts, axis=1)[:, whole])
        means.append(block_means(wrong, expected, tensor, bounds)[:, whole])
    squares = np.concatenate(means)
    return Figures(np.concatenate(steps), np.sqrt(squares), float(np.sqrt(squares.mean())))


def _with_fault(rows: Float32, bounds: Bounds, codes: BlockCodes, fault: str) -> Float32:
    """Return `rows` with `fault` in each block; the part of a block at a row's end stays sound."""
    size = codes.block_size
    whole = rows.shape[1] // size
    low, high = (end[:, :whole, None] for end in bounds)
    step = (high - low) / np.float32(2**codes.bits - 1)
    blocks = rows[:, : whole * size].reshape(len(rows), whole, size)
    found = np.rint(np.divide(blocks - low, step, out=np.zeros_like(blocks), where=step > 0))
    if fault == "codes of the neighbor":
        found = np.roll(found, 1, axis=1)
    elif fault == "codes in reverse":
        found = found[..., ::-1]
    elif fault == "zero point one off":
        found = found + 1
    wrong = rows.copy()
    wrong[:, : whole * size] = (low + found * step).reshape(len(rows), -1)
    return wrong


if __name__ == "__main__":
    main()
