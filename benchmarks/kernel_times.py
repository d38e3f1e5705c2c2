"""How fast ONNX Runtime's kernels multiply one row and many: what a faster answer or prompt needs.

    python benchmarks/kernel_times.py [--rows 256] [--threads 2] [--rounds 10]

A chain of the matrices of 22 MLPs of 1.1B geometry, without what is between them: each reads what
the one before it wrote, and all are more than the caches hold, as in a model. In turns: each
kernel's microseconds for a million values, for one row and for each of many, and for many its share
of what the processor can do in int8 (benchmarks/limits.py). The first two are the table in
exporter/graph/kernel_times.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import limits

WIDTH, INNER, PAIRS = 2048, 5632, 22
SHAPES = ((WIDTH, INNER), (INNER, WIDTH))
"""Inputs and outputs of the two matrices of a pair."""

FORMS = (
    (2, 32), (2, 64), (2, 128), (4, 16), (4, 32), (4, 64), (4, 128), (4, 256), (8, 32), (8, 64),
    (8, 128), (8, 256),
)  # fmt: skip

FLOAT, FLOAT_PAIRS = "MatMul, float32", 5
"""Fewer of float32, as ONNX's files have at most 2 GB."""

Weights = Mapping[str, np.ndarray]
Node = Callable[[Weights, str, str, int, int], onnx.NodeProto]
"""Makes a node of weights, the names of input and output, and the sizes of both."""


def chain(
    node: Node, weights: Callable[[int, int], dict[str, np.ndarray]], pairs: int = PAIRS
) -> bytes:
    """Return a model of x [S, WIDTH] -> y [S, WIDTH], whose matrices follow one another."""
    nodes, initializers, before = [], [], "x"
    for index, (inputs, outputs) in enumerate(SHAPES * pairs):
        named = {f"{name}{index}": value for name, value in weights(inputs, outputs).items()}
        after = "y" if index == 2 * pairs - 1 else f"y{index}"
        nodes.append(node(named, before, after, inputs, outputs))
        initializers += [numpy_helper.from_array(value, name) for name, value in named.items()]
        before = after
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["S", WIDTH]) for n in ("x", "y"))
    made = helper.make_graph(nodes, "kernel", [x], [y], initializers)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(made, opset_imports=domains, ir_version=10).SerializeToString())


def blocks(bits: int, block: int) -> bytes:
    """MatMulNBits with int8 activations and random codes; zero points as packages have them."""
    draw = np.random.default_rng(0)

    def weights(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        count = inputs // block
        codes = draw.integers(0, 256, (outputs, count, block * bits // 8), np.uint8)
        # Values stay of one size from matrix to matrix.
        scale = 2.4 / (1 << bits) / math.sqrt(inputs)
        scales = np.full((outputs, count), scale, np.float32)
        found = {"codes": codes, "scales": scales}
        if bits < 8:
            found["zeros"] = draw.integers(0, 256, (outputs, -(-count * bits // 8)), np.uint8)
        return found

    def node(weights: Weights, x: str, y: str, inputs: int, outputs: int) -> onnx.NodeProto:
        return helper.make_node(
            "MatMulNBits", [x, *weights], [y], domain="com.microsoft", K=inputs, N=outputs,
            bits=bits, block_size=block, accuracy_level=4,
        )  # fmt: skip

    return chain(node, weights)


def rows_of_int8() -> bytes:
    """DynamicQuantizeMatMul: a scale for each output, and one for all activations."""
    draw = np.random.default_rng(0)

    def weights(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        codes = draw.integers(-127, 128, (inputs, outputs), np.int8)
        return {"codes": codes, "scales": np.full(outputs, 0.0136 / math.sqrt(inputs), np.float32)}

    def node(weights: Weights, x: str, y: str, inputs: int, outputs: int) -> onnx.NodeProto:
        return helper.make_node("DynamicQuantizeMatMul", [x, *weights], [y], domain="com.microsoft")

    return chain(node, weights)


def floats() -> bytes:
    """MatMul in float32; fewer pairs, as each has 92 MB."""
    draw = np.random.default_rng(0)

    def weights(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"w": draw.standard_normal((inputs, outputs), np.float32) / math.sqrt(inputs)}

    def node(weights: Weights, x: str, y: str, inputs: int, outputs: int) -> onnx.NodeProto:
        return helper.make_node("MatMul", [x, *weights], [y])

    return chain(node, weights, FLOAT_PAIRS)


KERNELS: Mapping[str, Callable[[], bytes]] = {
    **{
        f"MatMulNBits, {bits} bits, block {block}": partial(blocks, bits, block)
        for bits, block in FORMS
    },
    "DynamicQuantizeMatMul, int8 for each output": rows_of_int8,
    FLOAT: floats,
}


def main() -> None:
    """Time all kernels in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    bound = limits.measure(arguments.threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    sessions = {
        name: ort.InferenceSession(make(), options, providers=["CPUExecutionProvider"])
        for name, make in KERNELS.items()
    }
    one = medians(sessions, 1, arguments.rounds, 16)  # tokens of one answer
    many = medians(sessions, arguments.rows, max(2, arguments.rounds // 3), 1)
    print(f"{limits.describe(bound)}; onnxruntime {ort.__version__}; medians; us for a million")
    print(f"values\n\n| kernel | one row | each of {arguments.rows} | of the int8 limit |")
    print("| --- | --- | --- | --- |")
    for name in sessions:
        # A million values are two million operations for each row.
        share = 2e12 / many[name] / bound.int8
        print(f"| {name} | {one[name]:.1f} | {many[name]:.2f} | {share:.0%} |")


def medians(
    sessions: Mapping[str, ort.InferenceSession], rows: int, rounds: int, repeated: int
) -> Mapping[str, float]:
    """Return each session's microseconds for a million values and a row, the median of rounds in
    which all take turns, each `repeated` times."""
    x = np.random.default_rng(1).standard_normal((rows, WIDTH), np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            session.run(None, {"x": x})  # warms up what the others pushed out
            for _ in range(repeated):
                started = time.perf_counter()
                session.run(None, {"x": x})
                seconds[name].append(time.perf_counter() - started)
    found = {}
    for name, values in seconds.items():
        pairs = FLOAT_PAIRS if name == FLOAT else PAIRS
        millions = pairs * 2 * WIDTH * INNER / 1e6
        found[name] = 1e6 * statistics.median(values) / rows / millions
    return found


if __name__ == "__main__":
    main()
