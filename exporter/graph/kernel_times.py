"""How long ONNX Runtime's kernels take for a matrix in each storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

READ_TOKENS = 4
"""Tokens of a prompt that are read for each token of the answer: an assumption."""


@dataclass(frozen=True)
class KernelTime:
    """Time of `MatMulNBits` with int8 activations, in microseconds for a million values: of `step`,
    with one row, as for each token of an answer; of `prompt`, for each of many rows."""

    step: float
    prompt: float


KERNEL_TIMES: Mapping[tuple[int, int], KernelTime] = {
    (2, 32): KernelTime(128.7, 15.97),
    (2, 64): KernelTime(30.1, 7.73),
    (4, 16): KernelTime(89.0, 7.79),
    (4, 32): KernelTime(50.8, 7.30),
    (4, 64): KernelTime(39.6, 6.67),
    (4, 128): KernelTime(34.0, 5.11),
    (8, 64): KernelTime(68.6, 6.02),
    (8, 128): KernelTime(55.3, 4.56),
}
"""By bits and block size. Only their ratios matter. `python benchmarks/kernel_times.py`, two vCPUs
of an Intel Xeon (Sapphire Rapids, AVX512-VNNI), onnxruntime 1.32."""


def chat_time(rows: int, columns: int, bits: int, block_size: int) -> int:
    """Return the nanoseconds that a matrix [rows, columns] takes for a token of an answer and the
    `READ_TOKENS` of a prompt before it, its last block padded.

    >>> chat_time(2048, 2048, 4, 128) < chat_time(2048, 2048, 4, 32)
    True
    """
    time = KERNEL_TIMES[bits, block_size]
    millions = rows * -(-columns // block_size) * block_size / 1e6
    return round(1e3 * millions * (time.step + READ_TOKENS * time.prompt))
