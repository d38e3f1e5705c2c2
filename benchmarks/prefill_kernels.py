"""How fast ONNX Runtime's kernels multiply many rows: what a faster prompt would need.

    python benchmarks/prefill_kernels.py [--rows 512] [--threads 2]

One matrix of 1.1B geometry (5632 x 2048), in turns: each kernel's operations in a second, and their
share of what the processor can do in int8 (benchmarks/limits.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import limits

WIDTH, OUT = 2048, 5632
ROUNDS = 9


def graph(nodes: list[onnx.NodeProto], weights: Mapping[str, np.ndarray]) -> bytes:
    """Return a model of x [S, WIDTH] -> y [S, OUT]."""
    made = helper.make_graph(
        nodes,
        "kernel",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["S", OUT])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(made, opset_imports=domains, ir_version=10).SerializeToString())


def blocks(bits: int, block: int) -> bytes:
    """MatMulNBits with int8 activations and random codes."""
    draw, count = np.random.default_rng(0), WIDTH // block
    weights = {
        "codes": draw.integers(0, 256, (OUT, count, block * bits // 8), np.uint8),
        "scales": draw.random((OUT, count), np.float32),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", K=WIDTH, N=OUT, bits=bits,
        block_size=block, accuracy_level=4,
    )  # fmt: skip
    return graph([node], weights)


def rows_of_int8() -> bytes:
    """DynamicQuantizeMatMul: a scale for each output, and one for all activations."""
    draw = np.random.default_rng(0)
    weights = {
        "codes": draw.integers(-127, 128, (WIDTH, OUT), np.int8),
        "scales": draw.random(OUT, np.float32),
    }
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *weights], ["y"], domain="com.microsoft")
    return graph([node], weights)


def floats() -> bytes:
    """MatMul in float32."""
    weights = {"w": np.random.default_rng(0).standard_normal((WIDTH, OUT), np.float32)}
    return graph([helper.make_node("MatMul", ["x", "w"], ["y"])], weights)


KERNELS: Mapping[str, Callable[[], bytes]] = {
    "MatMulNBits, 4 bits, block 32": lambda: blocks(4, 32),
    "MatMulNBits, 4 bits, block 64": lambda: blocks(4, 64),
    "MatMulNBits, 4 bits, block 128": lambda: blocks(4, 128),
    "MatMulNBits, 2 bits, block 64": lambda: blocks(2, 64),
    "MatMulNBits, 8 bits, block 32": lambda: blocks(8, 32),
    "MatMulNBits, 8 bits, block 128": lambda: blocks(8, 128),
    "DynamicQuantizeMatMul, int8 for each output": rows_of_int8,
    "MatMul, float32": floats,
}


def main() -> None:
    """Time all kernels in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    bound = limits.measure(arguments.threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    x = np.random.default_rng(1).standard_normal((arguments.rows, WIDTH), np.float32)
    sessions = {
        name: ort.InferenceSession(make(), options, providers=["CPUExecutionProvider"])
        for name, make in KERNELS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"x": x})
            seconds[name].append(time.perf_counter() - started)
    print(f"{limits.describe(bound)}; {arguments.rows} rows, onnxruntime {ort.__version__}\n")
    print("| kernel | GOP/s | of the int8 limit |\n| --- | --- | --- |")
    for name, values in seconds.items():
        rate = 2 * arguments.rows * WIDTH * OUT / statistics.median(values[1:])
        print(f"| {name} | {rate / 1e9:.0f} | {rate / bound.int8:.0%} |")


if __name__ == "__main__":
    main()
