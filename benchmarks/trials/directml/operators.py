"""Single-operator models: what DirectML's kernels compute, against the CPU's.

`make` writes the models, here; run as a program by the Windows Python (`operators.py FOLDER`), this
runs them on both providers and prints what each gave.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROWS, COLUMNS = 96, 320
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Matmul:
    """A MatMulNBits of random weights: `zeros` is the type of its zero points, if it has any;
    `scales` is how they are stored."""

    what: str
    bits: int = 4
    block: int = 32
    columns: int = COLUMNS
    zeros: str | None = None
    scales: str = "fp16"


MATMULS = (
    *(Matmul(f"int4, symmetric, blocks of {block}", block=block) for block in (16, 32, 64)),
    *(
        Matmul(f"int4, asymmetric, blocks of {block}", block=block, zeros="uint8")
        for block in (16, 32, 64)
    ),
    Matmul("int8, symmetric, blocks of 32", bits=8),
    Matmul("int8, asymmetric, blocks of 32", bits=8, zeros="uint8"),
    Matmul("int4, asymmetric, odd number of blocks", columns=160, zeros="uint8"),
    Matmul("int8, asymmetric, odd number of blocks", bits=8, columns=160, zeros="uint8"),
    Matmul("int4, last block not full", block=128),
    Matmul("int4, zero points in fp16", zeros="float16"),
    Matmul("int4, scales in fp32 before a Cast", scales="cast"),
    Matmul("int4, scales in uint8 times one fp16 a row", scales="packed"),
)


@dataclass
class Parts:
    """Nodes and weights of a model in the making."""

    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def make(folder: Path) -> Sequence[str]:
    """Write the models and their inputs as NUMBER.onnx and NUMBER.npz; return what each one is."""
    names = []
    rng = np.random.default_rng(0)
    for number, (name, parts, feeds) in enumerate(_models(rng)):
        _save(folder / f"{number}.onnx", parts, feeds)
        np.savez(folder / f"{number}.npz", x=feeds["x"])
        names.append(name)
    return names


def _models(rng: np.random.Generator) -> Iterator[tuple[str, Parts, dict[str, np.ndarray]]]:
    for matmul in MATMULS:
        x = rng.standard_normal((1, 3, matmul.columns)).astype(np.float16)
        yield matmul.what, _matmul(matmul, rng), {"x": x}
    ids = {"x": np.array([[3, 7, 49]], np.int64)}
    yield "embedding, GatherBlockQuantized of 4 bits", _gather_blocks(rng), ids
    yield "embedding of 8 bits: Gather, Cast, Sub, Mul", _embedding(8, rng), ids
    yield "embedding of 4 bits: the same, with BitwiseAnd and BitShift", _embedding(4, rng), ids
    x = rng.standard_normal((1, 3, 576)).astype(np.float16)
    x[..., 7] = 20000
    name = "SkipSimplifiedLayerNormalization in fp16, with a value of 20000"
    yield name, _norm(wide=False), {"x": x}
    yield (
        "Add, Cast to fp32, SimplifiedLayerNormalization, with the same",
        _norm(wide=True),
        {"x": x},
    )


def _matmul(matmul: Matmul, rng: np.random.Generator) -> Parts:
    import onnx.helper as oh

    parts, blocks = Parts(), -(-matmul.columns // matmul.block)
    shape = (ROWS, blocks, matmul.block * matmul.bits // 8)
    parts.weights["codes"] = rng.integers(0, 256, shape, dtype=np.uint8)
    inputs = ["x", "codes", _scales(matmul.scales, (ROWS, blocks), parts, rng)]
    if matmul.zeros == "uint8":
        packed = (ROWS, -(-blocks * matmul.bits // 8))
        parts.weights["zeros"] = rng.integers(0, 256, packed, dtype=np.uint8)
    elif matmul.zeros:
        parts.weights["zeros"] = (16 * rng.random((ROWS, blocks))).astype(matmul.zeros)
    inputs += ["zeros"] if matmul.zeros else []
    sizes: dict[str, Any] = {"N": ROWS, "K": matmul.columns}
    sizes |= {"bits": matmul.bits, "block_size": matmul.block}
    parts.nodes.append(oh.make_node("MatMulNBits", inputs, ["y"], domain=MICROSOFT, **sizes))
    return parts


def _scales(how: str, shape: tuple[int, int], parts: Parts, rng: np.random.Generator) -> str:
    """Add scales in the way `how` to `parts` and return their name."""
    import onnx.helper as oh
    from onnx import TensorProto

    scales = (0.02 * rng.random(shape) + 0.01).astype(np.float16)
    if how == "fp16":
        parts.weights["scales"] = scales
        return "scales"
    if how == "cast":
        parts.weights["wide"] = scales.astype(np.float32)
    else:
        parts.weights["steps"] = rng.integers(1, 256, shape, dtype=np.uint8)
        parts.weights["unit"] = (1e-4 * rng.random((shape[0], 1)) + 1e-5).astype(np.float16)
        for name in ("steps", "unit"):
            node = oh.make_node("Cast", [name], [f"{name} wide"], to=TensorProto.FLOAT)
            parts.nodes.append(node)
        parts.nodes.append(oh.make_node("Mul", ["steps wide", "unit wide"], ["wide"]))
    parts.nodes.append(oh.make_node("Cast", ["wide"], ["scales"], to=TensorProto.FLOAT16))
    return "scales"


def _gather_blocks(rng: np.random.Generator) -> Parts:
    import onnx.helper as oh

    parts = Parts()
    parts.weights["codes"] = rng.integers(0, 256, (50, 32), dtype=np.uint8)
    parts.weights["scales"] = (0.01 * rng.random((50, 2))).astype(np.float16)
    sizes: dict[str, Any] = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    inputs = ["codes", "x", "scales"]
    parts.nodes.append(
        oh.make_node("GatherBlockQuantized", inputs, ["y"], domain=MICROSOFT, **sizes)
    )
    return parts


def _embedding(bits: int, rng: np.random.Generator) -> Parts:
    """Rows of codes in blocks of 32, unpacked and scaled by plain operators."""
    import onnx.helper as oh
    from onnx import TensorProto

    parts, node = Parts(), oh.make_node
    parts.weights = {
        "codes": rng.integers(0, 256, (50, 2, 4 * bits), dtype=np.uint8),
        "scales": (0.01 * rng.random((50, 2, 1))).astype(np.float16),
        "zero": np.array(1 << (bits - 1), np.float16),
    }
    parts.nodes = [node("Gather", ["codes", "x"], ["rows"]), node("Gather", ["scales", "x"], ["s"])]
    if bits == 4:
        parts.weights |= {"mask": np.array(15, np.uint8), "four": np.array(4, np.uint8)}
        parts.nodes += [
            node("BitwiseAnd", ["rows", "mask"], ["low"]),
            node("BitShift", ["rows", "four"], ["high"], direction="RIGHT"),
            node("Concat", ["low", "high"], ["numbers"], axis=-1),
        ]
    parts.nodes += [
        node("Cast", ["numbers" if bits == 4 else "rows"], ["float"], to=TensorProto.FLOAT16),
        node("Sub", ["float", "zero"], ["centered"]),
        node("Mul", ["centered", "s"], ["y"]),
    ]
    return parts


def _norm(*, wide: bool) -> Parts:
    """The norm of x + x, in fp16 or, if `wide`, in fp32."""
    import onnx.helper as oh
    from onnx import TensorProto

    parts, node = Parts(), oh.make_node
    parts.weights["gain"] = np.ones(576, np.float16)
    if wide:
        parts.nodes = [
            node("Add", ["x", "x"], ["sum"]),
            node("Cast", ["sum"], ["wide"], to=TensorProto.FLOAT),
            node("SimplifiedLayerNormalization", ["wide", "gain"], ["y"], epsilon=1e-5),
        ]
    else:
        name = "SkipSimplifiedLayerNormalization"
        inputs = ["x", "x", "gain"]
        parts.nodes = [node(name, inputs, ["y"], domain=MICROSOFT, epsilon=1e-5)]
    return parts


def _save(file: Path, parts: Parts, feeds: dict[str, np.ndarray]) -> None:
    import onnx
    import onnx.helper as oh
    from onnx import TensorProto, numpy_helper

    inputs = [
        oh.make_tensor_value_info(
            name,
            oh.np_dtype_to_tensor_dtype(value.dtype),
            [f"{name} {axis}" for axis in range(value.ndim)],
        )
        for name, value in feeds.items()
    ]
    output = oh.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    weights = [numpy_helper.from_array(value, name) for name, value in parts.weights.items()]
    graph = oh.make_graph(parts.nodes, "one", inputs, [output], weights)
    opsets = [oh.make_opsetid("", 21), oh.make_opsetid(MICROSOFT, 1)]
    onnx.save(oh.make_model(graph, opset_imports=opsets, ir_version=10), file)


def main() -> None:
    """Run each model in the folder on DirectML and on the CPU; print one JSON line for each."""
    folder = Path(sys.argv[1])
    for number in range(len(list(folder.glob("*.onnx")))):
        try:
            answer = compare(folder / f"{number}.onnx")
        except Exception as error:  # onnxruntime's exceptions have no common base class
            answer = {"error": " ".join(str(error).split())[-200:]}
        print(json.dumps(answer), flush=True)


def compare(file: Path) -> dict[str, Any]:
    """Return where the nodes ran, the largest difference from the CPU, and the largest value."""
    feeds = dict(np.load(file.with_suffix(".npz")))
    _, expected = run(file, "CPUExecutionProvider", feeds)
    where, found = run(file, "DmlExecutionProvider", feeds)
    difference = float(np.abs(found - expected).max())
    return {"where": where, "difference": difference, "largest": float(np.abs(expected).max())}


def run(file: Path, provider: str, feeds: dict[str, np.ndarray]) -> tuple[dict[str, str], Any]:
    """Return the provider of each operator, and the output in double precision."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen: list[Any] = [provider]
    if provider.startswith("Dml"):
        chosen = [(provider, {"device_id": "0"}), "CPUExecutionProvider"]
    session = ort.InferenceSession(str(file), options, chosen, enable_fallback=0)
    parts = session.get_provider_graph_assignment_info()
    where = {node.op_type: part.ep_name for part in parts for node in part.get_nodes()}
    return where, session.run(None, feeds)[0].astype(np.float64)


if __name__ == "__main__":
    main()
