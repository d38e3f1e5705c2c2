"""How long ONNX Runtime's kernels take for a matrix in each storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

READ_TOKENS = 4
"""Tokens of a prompt that are read for each token of the answer. Chats differ in it; the choice
does little: from 1 to 16, 4 bits in blocks of 128 lead, and 8 bits in blocks of 128 are about as
fast as 4 bits in blocks of 32."""


@dataclass(frozen=True)
class KernelTime:
    """Time of `MatMulNBits` with int8 activations, in microseconds for a million values: `step` for
    one row, as each token of an answer is; `prompt` for each of many rows."""

    step: float
    prompt: float


KERNEL_TIMES: Mapping[tuple[int, int], KernelTime] = {
    (2, 32): KernelTime(58.6, 17.15),
    (2, 64): KernelTime(23.9, 7.68),
    (2, 128): KernelTime(18.3, 5.02),
    (4, 16): KernelTime(55.1, 8.29),
    (4, 32): KernelTime(37.0, 7.39),
    (4, 64): KernelTime(31.6, 6.35),
    (4, 128): KernelTime(26.4, 4.66),
    (8, 64): KernelTime(47.9, 5.73),
    (8, 128): KernelTime(42.7, 4.29),
}
"""By bits and block size. Only their ratios matter. `python benchmarks/kernel_times.py --rounds
6`, two vCPUs of an Intel Xeon (family 6, model 167, AVX512-VNNI and AMX), onnxruntime 1.32."""


def chat_time(rows: int, columns: int, bits: int, block_size: int) -> int:
    """Return the nanoseconds that a matrix [rows, columns] takes for a token of an answer and the
    `READ_TOKENS` of a prompt before it, its last block padded.

    >>> chat_time(2048, 2048, 4, 128) < chat_time(2048, 2048, 4, 32)
    True
    """
    time = KERNEL_TIMES[bits, block_size]
    millions = rows * -(-columns // block_size) * block_size / 1e6
    return round(1e3 * millions * (time.step + READ_TOKENS * time.prompt))
