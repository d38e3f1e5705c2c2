"""Storages of a matrix: what MatMulNBits takes for each, how exact it is, and what opening takes.

    python benchmarks/storages.py

One matrix of 4096 x 4096, times one row (as in decoding) and 128 rows (as in a prompt). All
storages are measured in turn, again and again, on one thread; printed are medians of the ratio of
a call's processor time to that of int4 in blocks of 32 with plain scales, called just before: other
programs on the machine disturb it less than they do the time on the clock. The first row shows how
much they do all the same. "error" is relative to float64 with the same weights, at accuracy level
1, which computes in float32.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from llama_onnx.exporter.checkpoints.package.matrices import dequantize
from llama_onnx.exporter.model.storage import Quantized, RowBlocks

SIZE = 4096
ROUNDS = {1: 150, 128: 15}
"""Rows -> calls. One row takes a millisecond, and is disturbed more easily."""

STORAGES = (
    RowBlocks(4, 32),
    RowBlocks(4, 32, stored_scales="fp16"),
    RowBlocks(4, 32, stored_scales="uint8"),
    RowBlocks(4, 32, zero_points=True),
    RowBlocks(4, 32, zero_points=True, stored_scales="uint8"),
    RowBlocks(4, 128, zero_points=True, stored_scales="uint8"),
    RowBlocks(2, 16, zero_points=True, stored_scales="uint8"),
    RowBlocks(2, 32, zero_points=True, stored_scales="uint8"),
    RowBlocks(2, 64, zero_points=True, stored_scales="uint8"),
    RowBlocks(2, 128, zero_points=True, stored_scales="uint8"),
    RowBlocks(8, 32),
    RowBlocks(8, 32, stored_scales="fp16"),
    RowBlocks(8, 64, zero_points=True, stored_scales="uint8"),
)

_TYPES = {"uint8": TensorProto.UINT8, "fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16,
          "bf16": TensorProto.BFLOAT16}  # fmt: skip

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Subject:
    """One storage: sessions at accuracy levels 4 and 1, bytes of the arrays, milliseconds that
    opening took, and the error at level 1."""

    storage: RowBlocks
    session: ort.InferenceSession
    nbytes: int
    opening: float
    error: float


def matrix(storage: RowBlocks) -> tuple[tuple[Array, ...], Array]:
    """Return random codes and scales as `storage` stores them, and the weights in float64."""
    random, blocks = np.random.default_rng(0), SIZE // storage.block_size
    codes = random.integers(0, 1 << storage.bits, (SIZE, SIZE), np.uint8)
    scales = random.uniform(0.002, 0.004, (SIZE, blocks)).astype(np.float32)
    scales = storage.representable(scales)
    zeros = None
    if storage.zero_points:
        zeros = random.integers(0, 1 << storage.bits, (SIZE, blocks), np.uint8)
    arrays = storage.encoded(Quantized(codes, scales, zeros))
    packed = arrays[-1] if zeros is not None else None
    found = dequantize(arrays[0], scales, storage.bits, storage.block_size, SIZE, packed)
    return arrays, found.astype(np.float64)


def model(storage: RowBlocks, arrays: tuple[Array, ...], level: int) -> bytes:
    """Return a graph with one MatMulNBits, its scales made as the exporter's graphs make them."""
    parts = storage.parts((SIZE, SIZE))
    tensors = [
        helper.make_tensor(part.name, _TYPES[part.dtype], part.shape, array.tobytes(), raw=True)
        for part, array in zip(parts, arrays, strict=True)
    ]
    nodes, scales = [], "scales"
    if storage.stored_scales != "plain":
        nodes.append(helper.make_node("Cast", ["scales"], ["wide"], to=TensorProto.FLOAT))
        scales = "wide"
    if storage.stored_scales == "uint8":
        nodes.append(helper.make_node("Cast", ["row_scales"], ["rows"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", ["wide", "rows"], ["product"]))
        scales = "product"
    inputs = ["x", "qweight", scales, *(["zero_points"] if storage.zero_points else [])]
    attributes = {"K": SIZE, "N": SIZE, "bits": storage.bits, "block_size": storage.block_size}
    nodes.append(helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft",
                                  accuracy_level=level, **attributes))  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", SIZE]) for n in "xy"]
    graph = helper.make_graph(nodes, "storage", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    content: bytes = helper.make_model(
        graph, opset_imports=opsets, ir_version=10
    ).SerializeToString()
    return content


def open_model(content: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def prepare(storage: RowBlocks) -> Subject:
    arrays, weights = matrix(storage)
    x = inputs(4)
    (exact,) = open_model(model(storage, arrays, 1)).run(None, {"x": x})
    expected = x @ weights.T
    error = np.linalg.norm(exact - expected) / np.linalg.norm(expected)
    content = model(storage, arrays, 4)
    times = []
    for _ in range(3):
        started = time.process_time()
        session = open_model(content)
        times.append(time.process_time() - started)
    nbytes = sum(array.nbytes for array in arrays)
    return Subject(storage, session, nbytes, 1e3 * min(times), float(error))


def inputs(rows: int) -> Array:
    return np.random.default_rng(1).standard_normal((rows, SIZE)).astype(np.float32)


def seconds(session: ort.InferenceSession, x: Array) -> float:
    """Return the processor time of a call, after one that reads the weights into the cache that it
    can keep."""
    session.run(None, {"x": x[:1]})
    started = time.process_time()
    session.run(None, {"x": x})
    return time.process_time() - started


def ratios(subjects: list[Subject], rows: int, rounds: int) -> list[float]:
    """Return, for each of `subjects`, the median ratio of the time of its call to that of the first
    one's, which is called just before."""
    x = inputs(rows)
    found = [
        [seconds(subject.session, x) / seconds(subjects[0].session, x) for subject in subjects]
        for _ in range(rounds)
    ]
    return [float(ratio) for ratio in np.median(found, axis=0)]


def main() -> None:
    subjects = [prepare(storage) for storage in STORAGES]
    columns = [ratios(subjects, rows, rounds) for rows, rounds in ROUNDS.items()]
    print(f"ONNX Runtime {ort.__version__}")
    print("| Storage | bits per weight | 1 row | 128 rows | opening, ms | error |")
    print("| --- | --- | --- | --- | --- | --- |")
    for index, subject in enumerate(subjects):
        stored = subject.storage
        name = f"int{stored.bits}, blocks of {stored.block_size}"
        name += ", zero points" if stored.zero_points else ""
        name += f", {stored.stored_scales} scales" if stored.stored_scales != "plain" else ""
        times = " | ".join(f"{found[index]:.2f}" for found in columns)
        bits = 8 * subject.nbytes / SIZE**2
        print(f"| {name} | {bits:.3f} | {times} | {subject.opening:.0f} | {subject.error:.0e} |")


if __name__ == "__main__":
    main()
