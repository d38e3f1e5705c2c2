"""What CUDA's quantized kernels compute, on random values, and how fast: one operator at a time.

    python -m benchmarks.trials.cuda_operators [--json FILE]

The expected values are numpy's, in double precision, from the numbers that the codes stand for. A
product is timed in a chain of 16 matrices, which do not fit the device's cache, with input and
output on the device. `--provider cpu --size 256` tests the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx.helper as oh
from onnx import TensorProto

from benchmarks.trials.operator_model import MICROSOFT, operator_model
from llama_onnx.runtime import ort

MATRICES, RUNS = 16, 20
ROOM = 128
"""Positions that a shared cache has."""
INT4_GEMM = {"ep.cuda.fpa_intb_gemm": "1"}
"""Off by default: products with int4 weights that are not widened to fp16 first."""


@dataclass
class Model:
    """Nodes, weights, inputs, and the types of the outputs."""

    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    feeds: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=lambda: {"y": TensorProto.FLOAT16})


@dataclass(frozen=True)
class Matrix:
    """A square matrix in blocks: how its zero points and its scales are stored. 16 bits: fp16."""

    size: int
    bits: int = 4
    block: int = 32
    zeros: str = "none"
    scales: str = "fp16"
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def what(self) -> str:
        """Its name in the table."""
        if self.bits == 16:
            return "fp16, a MatMul"
        zeros = {"none": "symmetric", "uint8": "uint8 zero points", "fp16": "fp16 zero points"}
        text = f"int{self.bits}, blocks of {self.block}, {zeros[self.zeros]}, {self.scales} scales"
        return text + "".join(f", {key}={value}" for key, value in self.settings)


def main() -> None:
    """Run everything on the provider; print a line for each case as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--provider", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of a matrix")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.provider == "cuda":
        ort.preload_libraries()
    rows = []
    for what, case in cases(arguments.size, arguments.provider):
        try:
            row = {"what": what, **case()}
        except Exception as error:  # onnxruntime's exceptions have no common base class
            row = {"what": what, "error": " ".join(str(error).split())[-400:]}
        print(json.dumps(row), flush=True)
        rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def cases(size: int, device: str) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What to run, and the call that does."""
    plain = [
        Matrix(size, 16),
        *(
            Matrix(size, bits, zeros=zeros, scales=scales)
            for bits, zeros, scales in product(
                (4, 8), ("none", "uint8"), ("fp16", "cast", "packed")
            )
        ),
    ]
    others = [
        *(Matrix(size, bits, zeros="fp16") for bits in (4, 8)),
        *(Matrix(size, block=b, zeros=z) for b, z in product((16, 128), ("none", "uint8"))),
        *(Matrix(size + 32, bits, zeros="uint8") for bits in (4, 8)),  # an odd number of blocks
        *(
            Matrix(size, bits, zeros=zeros, settings=tuple(INT4_GEMM.items()))
            for bits, zeros in product((4, 8), ("none", "uint8"))
        ),
    ]
    for matrix in (*plain, *others):
        yield matrix.what, partial(products, matrix, device)
    for bits, zeros in product((4, 8), (False, True)):
        what = f"GatherBlockQuantized, {bits} bits{', uint8 zero points' if zeros else ''}"
        yield what, partial(gather, bits, zeros, device)
    for kind, shared in product(("NONE", "PER_TENSOR", "PER_CHANNEL"), (False, True)):
        cache = "fp16 cache" if kind == "NONE" else f"int8 cache, {kind}"
        what = f"GroupQueryAttention, {cache}{', one buffer' if shared else ''}"
        yield what, partial(attention, kind, shared, device)


# MatMulNBits


def products(matrix: Matrix, device: str) -> dict[str, Any]:
    """The error of one matrix for several numbers of rows, and the time of a chain."""
    row: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    weights, values = codes(matrix, rng)
    session = opened(chain(matrix, [weights]), device, matrix.settings)
    row["where"] = where(session)
    for rows in (1, 3, 64, 512):
        x = rng.standard_normal((1, rows, matrix.size)).astype(np.float16)
        (y,) = session.run(None, {"x": x})
        row[f"error, {rows} rows"] = relative(y[0], x[0].astype(np.float64) @ values.T)
    del session, values
    session = opened(chain(matrix, [weights] * MATRICES), device, matrix.settings)
    for rows in (1, 64, 512):
        row[f"us, {rows} rows"] = microseconds(session, rows, matrix.size, device) / MATRICES
    return row


def codes(matrix: Matrix, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The initializers of a random matrix, and its values in double precision."""
    rows, blocks = matrix.size, matrix.size // matrix.block
    if matrix.bits == 16:
        values = (rng.standard_normal((rows, rows), np.float32) / np.sqrt(rows)).astype(np.float16)
        return {"values": values.T.copy()}, values.astype(np.float64)
    raw = rng.integers(0, 1 << matrix.bits, (rows, blocks, matrix.block), dtype=np.uint8)
    found = {"codes": packed(raw, matrix.bits)}
    unit = 1.0 / (np.sqrt(matrix.size) * (1 << (matrix.bits - 1)))  # keeps the size of values
    zeros: Any = np.full((rows, blocks), 1 << (matrix.bits - 1))
    if matrix.zeros == "uint8":
        zeros = rng.integers(0, 1 << matrix.bits, (rows, blocks), dtype=np.uint8)
        found["zeros"] = packed(zeros, matrix.bits)
    elif matrix.zeros == "fp16":
        zeros = ((1 << matrix.bits) * rng.random((rows, blocks))).astype(np.float16)
        found["zeros"] = zeros
    if matrix.scales == "packed":
        steps = rng.integers(1, 256, (rows, blocks), dtype=np.uint8)
        units = (unit * (1 + rng.random((rows, 1))) / 128).astype(np.float16)
        found |= {"steps": steps, "unit": units}
        scales = (steps.astype(np.float32) * units.astype(np.float32)).astype(np.float16)
    else:
        scales = (unit * (1 + rng.random((rows, blocks)))).astype(np.float16)
        found["scales"] = scales.astype(np.float32) if matrix.scales == "cast" else scales
    wide = (raw.astype(np.float64) - zeros.astype(np.float64)[..., None]) * scales[..., None]
    return found, wide.reshape(rows, -1)


def packed(raw: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis, two in a byte if they have 4 bits."""
    if bits == 8:
        return raw
    if raw.shape[-1] % 2:
        raw = np.concatenate([raw, np.zeros_like(raw[..., :1])], axis=-1)
    return np.asarray(raw[..., ::2] | raw[..., 1::2] << 4, np.uint8)


def chain(matrix: Matrix, many: Sequence[dict[str, np.ndarray]]) -> Model:
    """A model that multiplies x by each matrix in turn."""
    model, last = Model(), "x"
    model.feeds["x"] = np.zeros((1, 1, matrix.size), np.float16)
    for index, weights in enumerate(many):
        model.weights |= {f"{name} {index}": value for name, value in weights.items()}
        before, last = last, "y" if index == len(many) - 1 else f"y {index}"
        if matrix.bits == 16:
            model.nodes.append(oh.make_node("MatMul", [before, f"values {index}"], [last]))
            continue
        scales = f"scales {index}"
        if matrix.scales == "packed":
            wide = [f"steps {index}", f"unit {index}"]
            model.nodes += [
                oh.make_node("Cast", [n], [f"{n} w"], to=TensorProto.FLOAT) for n in wide
            ]
            model.nodes.append(oh.make_node("Mul", [f"{n} w" for n in wide], [f"wide {index}"]))
        if matrix.scales != "fp16":
            source = f"wide {index}" if matrix.scales == "packed" else scales
            scales = f"narrow {index}"
            model.nodes.append(oh.make_node("Cast", [source], [scales], to=TensorProto.FLOAT16))
        inputs = [before, f"codes {index}", scales]
        inputs += [f"zeros {index}"] if "zeros" in weights else []
        sizes: dict[str, Any] = {"N": matrix.size, "K": matrix.size}
        sizes |= {"bits": matrix.bits, "block_size": matrix.block}
        model.nodes.append(oh.make_node("MatMulNBits", inputs, [last], domain=MICROSOFT, **sizes))
    return model


def microseconds(session: Any, rows: int, size: int, device: str) -> float:
    """The least time of a run."""
    x = np.random.default_rng(1).standard_normal((1, rows, size)).astype(np.float16)
    binding, value = session.io_binding(), ort.to_device(x, device)
    binding.bind_ortvalue_input("x", value)
    binding.bind_ortvalue_output("y", ort.to_device(x.copy(), device))
    times = []
    for _ in range(RUNS):
        started = perf_counter()
        session.run_with_iobinding(binding)
        times.append(perf_counter() - started)
    return 1e6 * min(times)


# GatherBlockQuantized


def gather(bits: int, zeros: bool, device: str) -> dict[str, Any]:
    """The error of reading rows of a quantized table."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 1 << bits, (1000, 64, 32), dtype=np.uint8)
    scales = (0.01 * rng.random((1000, 64)) + 0.01).astype(np.float16)
    offsets = np.full((1000, 64), 1 << (bits - 1), np.uint8)
    model = Model(weights={"codes": packed(raw, bits).reshape(1000, -1), "scales": scales})
    if zeros:
        offsets = rng.integers(0, 1 << bits, (1000, 64), dtype=np.uint8)
        model.weights["zeros"] = packed(offsets, bits)
    model.feeds["x"] = rng.integers(0, 1000, (1, 37))
    inputs = ["codes", "x", "scales", *(["zeros"] if zeros else [])]
    sizes: dict[str, Any] = {"bits": bits, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    model.nodes = [oh.make_node("GatherBlockQuantized", inputs, ["y"], domain=MICROSOFT, **sizes)]
    session = opened(model, device)
    (found,) = session.run(None, model.feeds)
    values = (raw.astype(np.float64) - offsets[..., None].astype(np.float64)) * scales[..., None]
    return {
        "where": where(session),
        "error": relative(found[0], values.reshape(1000, -1)[model.feeds["x"][0]]),
    }


# GroupQueryAttention


@dataclass(frozen=True)
class Heads:
    """An attention's `heads`, those whose keys and values it keeps, and their width."""

    heads: int
    kept: int
    width: int

    @property
    def packed(self) -> int:
        """The width of query, key and value in one matrix."""
        return (self.heads + 2 * self.kept) * self.width


def attention(kind: str, shared: bool, device: str) -> dict[str, Any]:
    """A prompt of 64 and a step, against the CPU's with an fp16 cache."""
    shape = Heads(32, 8, 128)
    qkv = np.random.default_rng(0).standard_normal((1, 65, shape.packed)).astype(np.float16)
    scale = np.full((1,) if kind == "PER_TENSOR" else (shape.kept, 1, shape.width), 5 / 127)
    scale = scale.astype(np.float32)
    expected = continued(opened(attend(shape, "NONE", scale), "cpu"), shape, qkv, True, "cpu")
    session = opened(attend(shape, kind, scale), device)
    found = continued(session, shape, qkv, shared, device)
    prompt, step = (relative(b, a) for a, b in zip(expected, found, strict=True))
    return {"where": where(session), "error, prompt": prompt, "error, step": step}


def continued(
    session: Any, shape: Heads, qkv: np.ndarray, shared: bool, device: str
) -> list[np.ndarray]:
    """The outputs for all positions but the last, then for the last after their cache."""
    binding, found = session.io_binding(), []
    cache = ort.numpy_dtype({entry.name: entry for entry in session.get_inputs()}["past key"].type)
    empty = np.zeros((1, shape.kept, ROOM if shared else 0, shape.width), cache)
    past = [ort.to_device(empty, device), ort.to_device(empty.copy(), device)]
    length = qkv.shape[1] - 1
    for first, last in ((0, length), (length, length + 1)):
        feeds = {
            "x": np.ascontiguousarray(qkv[:, first:last]),
            "lengths": np.array([last - 1], np.int32),
            "total": np.array(last, np.int32),
        }
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for name, buffer in zip(("key", "value"), past, strict=True):
            binding.bind_ortvalue_input(f"past {name}", buffer)
            if shared:
                binding.bind_ortvalue_output(name, buffer)
            else:
                binding.bind_output(name, device)
        binding.bind_output("y")
        session.run_with_iobinding(binding)
        bound = binding.get_outputs()
        (y,) = (value for value in bound if len(value.shape()) == 3)
        found.append(y.numpy().astype(np.float64))
        past = past if shared else [value for value in bound if len(value.shape()) == 4]
    return found


def attend(shape: Heads, kind: str, scale: np.ndarray) -> Model:
    """A model of one attention with rotary tables."""
    half = shape.width // 2
    angles = np.outer(np.arange(ROOM), 10000.0 ** -(np.arange(half) / half))
    past = np.zeros((1, shape.kept, 1, shape.width), np.int8 if kind != "NONE" else np.float16)
    model = Model(
        weights={
            "cos": np.cos(angles).astype(np.float16),
            "sin": np.sin(angles).astype(np.float16),
        },
        feeds={
            "x": np.zeros((1, 1, shape.packed), np.float16),
            "past key": past,
            "past value": past,
            "lengths": np.zeros(1, np.int32),
            "total": np.array(0, np.int32),
        },
    )
    inputs = ["x", "", "", "past key", "past value", "lengths", "total", "cos", "sin"]
    attributes: dict[str, Any] = {"num_heads": shape.heads, "do_rotary": 1}
    attributes["kv_num_heads"] = shape.kept
    if kind != "NONE":
        model.weights["scale"] = scale
        inputs += ["", "", "", "scale", "scale"]
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
    node = oh.make_node(
        "GroupQueryAttention", inputs, ["y", "key", "value"], domain=MICROSOFT, **attributes
    )
    model.nodes.append(node)
    kept_type = TensorProto.INT8 if kind != "NONE" else TensorProto.FLOAT16
    model.outputs |= {"key": kept_type, "value": kept_type}
    return model


# Sessions


def opened(model: Model, device: str, settings: Sequence[tuple[str, str]] = ()) -> Any:
    """A session that says where its nodes run, after constants were folded."""
    runtime = ort.load()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in settings:
        options.add_session_config_entry(key, value)
    made = operator_model(model.nodes, model.weights, model.feeds, model.outputs)
    providers = ["CUDAExecutionProvider"] if device == "cuda" else []
    return runtime.InferenceSession(
        made.SerializeToString(), options, [*providers, "CPUExecutionProvider"], enable_fallback=0
    )


def where(session: Any) -> dict[str, str]:
    """The provider of each operator that is left."""
    parts = session.get_provider_graph_assignment_info()
    return {node.op_type: part.ep_name for part in parts for node in part.get_nodes()}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The relative L2 difference."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


if __name__ == "__main__":
    main()
