"""How fast ONNX Runtime's kernels multiply one row and many: what a faster answer or prompt needs.

    python benchmarks/kernel_times.py [--rows 256] [--threads 2] [--rounds 20]

Matrices of 1.1B geometry (5632 x 2048), more of them than the caches hold, in turns: each kernel's
microseconds for a million values, for one row and for each of many, and for many its share of what
the processor can do in int8 (benchmarks/limits.py). The first two are the table in
exporter/graph/kernel_times.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import limits

WIDTH, OUT = 2048, 5632
MATRICES = 16
FORMS = (
    (2, 32), (2, 64), (2, 128), (4, 16), (4, 32), (4, 64), (4, 128), (4, 256), (8, 32), (8, 64),
    (8, 128), (8, 256),
)  # fmt: skip

Weights = Mapping[str, np.ndarray]


def graph(node: Callable[[Weights, str], onnx.NodeProto], weights: Iterable[Weights]) -> bytes:
    """Return a model of x [S, WIDTH] -> y0, y1, ... [S, OUT], each by `node` of one of `weights`,
    whose names get a number of their own."""
    nodes, initializers, outputs = [], [], []
    for index, one in enumerate(weights):
        named = {f"{name}{index}": value for name, value in one.items()}
        nodes.append(node(named, f"y{index}"))
        initializers += [numpy_helper.from_array(value, name) for name, value in named.items()]
        outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, ["S", OUT]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["S", WIDTH])
    made = helper.make_graph(nodes, "kernel", [x], outputs, initializers)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(made, opset_imports=domains, ir_version=10).SerializeToString())


def blocks(bits: int, block: int) -> bytes:
    """MatMulNBits with int8 activations and random codes; zero points as packages have them."""
    draw, count = np.random.default_rng(0), WIDTH // block

    def weights() -> Weights:
        codes = draw.integers(0, 256, (OUT, count, block * bits // 8), np.uint8)
        found = {"codes": codes, "scales": draw.random((OUT, count), np.float32)}
        if bits < 8:
            found["zeros"] = draw.integers(0, 256, (OUT, -(-count * bits // 8)), np.uint8)
        return found

    def node(weights: Weights, output: str) -> onnx.NodeProto:
        return helper.make_node(
            "MatMulNBits", ["x", *weights], [output], domain="com.microsoft", K=WIDTH, N=OUT,
            bits=bits, block_size=block, accuracy_level=4,
        )  # fmt: skip

    return graph(node, (weights() for _ in range(MATRICES)))


def rows_of_int8() -> bytes:
    """DynamicQuantizeMatMul: a scale for each output, and one for all activations."""
    draw = np.random.default_rng(0)
    codes = (draw.integers(-127, 128, (WIDTH, OUT), np.int8) for _ in range(MATRICES))
    return graph(
        lambda weights, output: helper.make_node(
            "DynamicQuantizeMatMul", ["x", *weights], [output], domain="com.microsoft"
        ),
        ({"codes": each, "scales": draw.random(OUT, np.float32)} for each in codes),
    )


def floats() -> bytes:
    """MatMul in float32; two matrices, as each has 46 MB."""
    draw = np.random.default_rng(0)
    return graph(
        lambda weights, output: helper.make_node("MatMul", ["x", *weights], [output]),
        ({"w": draw.standard_normal((WIDTH, OUT), np.float32)} for _ in range(2)),
    )


KERNELS: Mapping[str, Callable[[], bytes]] = {
    **{
        f"MatMulNBits, {bits} bits, block {block}": partial(blocks, bits, block)
        for bits, block in FORMS
    },
    "DynamicQuantizeMatMul, int8 for each output": rows_of_int8,
    "MatMul, float32": floats,
}


def main() -> None:
    """Time all kernels in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    bound = limits.measure(arguments.threads)
    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    sessions = {
        name: ort.InferenceSession(make(), options, providers=["CPUExecutionProvider"])
        for name, make in KERNELS.items()
    }
    one = fastest(sessions, 1, 8 * arguments.rounds)  # short, so that noise weighs more
    many = fastest(sessions, arguments.rows, arguments.rounds)
    print(f"{limits.describe(bound)}; onnxruntime {ort.__version__}; the fastest of")
    print(f"{arguments.rounds} rounds; us for a million values\n")
    print(f"| kernel | one row | each of {arguments.rows} | of the int8 limit |")
    print("| --- | --- | --- | --- |")
    for name in sessions:
        # A million values are two million operations for each row.
        share = 2e12 / many[name] / bound.int8
        print(f"| {name} | {one[name]:.1f} | {many[name]:.2f} | {share:.0%} |")


def fastest(
    sessions: Mapping[str, ort.InferenceSession], rows: int, rounds: int
) -> Mapping[str, float]:
    """Return each session's microseconds for a million values and a row, in the fastest round."""
    x = np.random.default_rng(1).standard_normal((rows, WIDTH), np.float32)
    seconds = dict.fromkeys(sessions, float("inf"))
    for _ in range(rounds + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"x": x})
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return {
        name: 1e6 * seconds[name] / rows / (len(session.get_outputs()) * WIDTH * OUT / 1e6)
        for name, session in sessions.items()
    }


if __name__ == "__main__":
    main()
