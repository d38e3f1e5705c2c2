"""Act-order in ONNX Runtime: MatMulNBits' own g_idx against a Gather of its input.

    python benchmarks/act_order.py

One matrix of 4096 x 4096 with four bits, random groups of 128 input channels, one row of input.
Prints the time of a call and the error relative to float64.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

SIZE, GROUP = 4096, 128
ROUNDS = 20

Array = npt.NDArray[Any]


def session(weights: dict[str, Array], gather: bool) -> ort.InferenceSession:
    inputs = ["x", *(name if name in weights else "" for name in ("q", "s", "z", "g"))]
    nodes = []
    if gather:
        nodes.append(helper.make_node("Gather", ["x", "order"], ["sorted"], axis=-1))
        inputs[0] = "sorted"
    settings = {"K": SIZE, "N": SIZE, "bits": 4, "block_size": GROUP, "accuracy_level": 1}
    nodes.append(helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", **settings))
    graph = helper.make_graph(
        nodes,
        "act_order",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, SIZE])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def measure(zero_points: bool, gather: bool) -> tuple[float, float]:
    """Return the median seconds of a call, and the relative error."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.arange(SIZE) // GROUP)
    order = np.argsort(groups, kind="stable")
    codes = rng.integers(0, 16, (SIZE, SIZE), np.uint8)
    scales = rng.standard_normal((SIZE, SIZE // GROUP)).astype(np.float32)
    zeros = rng.integers(0, 16, scales.shape, np.uint8) if zero_points else np.full_like(scales, 8)
    x = rng.standard_normal((1, SIZE)).astype(np.float32)
    weight = (codes.astype(np.float64) - zeros[:, groups]) * scales[:, groups]
    expected = x @ weight.T
    stored = codes[:, order] if gather else codes
    weights = {"q": (stored[:, ::2] | stored[:, 1::2] << 4).reshape(SIZE, -1, GROUP // 2)}
    weights |= {"s": scales, **({"z": zeros[:, ::2] | zeros[:, 1::2] << 4} if zero_points else {})}
    weights |= {"order": order} if gather else {"g": groups.astype(np.int32)}
    runner, seconds = session(weights, gather), []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        (found,) = runner.run(None, {"x": x})
        seconds.append(time.perf_counter() - started)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return float(np.median(seconds)), float(error)


def main() -> None:
    print(f"{'':30} {'ms':>8} {'rel L2':>9}")
    for zero_points in (False, True):
        for gather in (False, True):
            seconds, error = measure(zero_points, gather)
            name = "Gather" if gather else "g_idx"
            label = f"{name}{', zero points' if zero_points else ''}"
            print(f"{label:30} {1e3 * seconds:8.2f} {error:9.1e}", flush=True)


if __name__ == "__main__":
    main()
