"""Single operators: what DirectML's kernels compute, against the CPU's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
from onnx import TensorProto

from benchmarks.trials.directml.place import DIRECTML, Place
from benchmarks.trials.operator_model import MICROSOFT, operator_model
from tests.support.tables import Case

ROWS, COLUMNS = 96, 320
Arrays = dict[str, np.ndarray]
AT_LOAD = {"Cast", "Mul", "Reshape"}
"""Operators on weights alone, which ONNX Runtime computes once, before it runs anything."""


@dataclass(frozen=True)
class Model:
    """A model in the making: its nodes, weights and inputs; `y` is its output.

    `outputs` are further ones. `dtype` is that of `y`."""

    nodes: list[Any] = field(default_factory=list)
    weights: Arrays = field(default_factory=dict)
    inputs: Arrays = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    dtype: type = np.float16


@dataclass(frozen=True)
class Matmul:
    """A MatMulNBits of random weights: `zeros` is the type of its zero points, if it has any;
    `scales` is how they are stored, `codes` what is before the codes."""

    what: str
    bits: int = 4
    block: int = 32
    columns: int = COLUMNS
    zeros: str | None = None
    scales: str = "plain"
    codes: str = "plain"
    dtype: type = np.float16


MATMULS = (
    *(Matmul(f"int4, symmetric, blocks of {size}", block=size) for size in (16, 32, 64)),
    Matmul("int4, symmetric, blocks of 128", block=128, columns=384),
    *(
        Matmul(f"int4, asymmetric, blocks of {size}", block=size, zeros="uint8")
        for size in (16, 32, 64)
    ),
    Matmul("int4, asymmetric, blocks of 128", block=128, columns=512, zeros="uint8"),
    *(Matmul(f"int8, symmetric, blocks of {size}", bits=8, block=size) for size in (16, 32, 64)),
    Matmul("int8, symmetric, blocks of 128", bits=8, block=128, columns=384),
    Matmul("int8, asymmetric, blocks of 32", bits=8, zeros="uint8"),
    Matmul("int4, asymmetric, odd number of blocks", columns=160, zeros="uint8"),
    Matmul("int8, asymmetric, odd number of blocks", bits=8, columns=160, zeros="uint8"),
    Matmul("int4, last block not full", block=128),
    Matmul("int4, zero points in fp16", zeros="float16"),
    Matmul("int4, scales in fp32 before a Cast", scales="cast"),
    Matmul("int4, scales in uint8 times one fp16 a row", scales="packed"),
    Matmul(
        "int4, asymmetric, scales in uint8 times one fp16 a row", zeros="uint8", scales="packed"
    ),
    Matmul("int4 in fp32, scales in fp16 before a Cast", scales="cast", dtype=np.float32),
    Matmul("int8, codes before a Reshape, as a head that is the embedding", bits=8, codes="rows"),
)


@dataclass(frozen=True)
class Attention:
    """A GroupQueryAttention of `new` tokens after `past`, in a cache with room for 32.

    `stale`: the cache has other tokens after those, as after rewinding. Not `shared`: past and
    present are two buffers, and `y` is the present keys."""

    what: str
    past: int
    new: int
    stale: bool = False
    shared: bool = True


TWO_BUFFERS = "keys after one token after 5, past and present in two buffers"
ATTENTIONS = (
    Attention("attention to a prompt of 5, empty cache", 0, 5),
    Attention("attention to one token after 5", 5, 1),
    Attention("attention to one token after 3, the cache rewound from 5", 3, 1, stale=True),
    Attention("attention to 3 tokens after 5: a chunk, or a second prompt", 5, 3),
    Attention("attention to 3 tokens after 3, the cache rewound from 5", 3, 3, stale=True),
    Attention(TWO_BUFFERS, 5, 1, shared=False),
)

ZEROS_ODD, ZEROS_HALF = "int8, asymmetric, odd number of blocks", "int4, zero points in fp16"
NARROW_NORM = "SkipSimplifiedLayerNormalization in fp16, with a value of 20000"
WRONG = {
    ZEROS_ODD,
    "int4, last block not full",
    ZEROS_HALF,
    "embedding, GatherBlockQuantized of 4 bits",
    "embedding, GatherBlockQuantized of 8 bits",
    NARROW_NORM,
    "attention to 3 tokens after 5: a chunk, or a second prompt",
    "attention to 3 tokens after 3, the cache rewound from 5",
    TWO_BUFFERS,
}
"""What DirectML is known not to compute: the exporter refuses or avoids it."""


def operator_cases(place: Place) -> Iterator[Case]:
    """Operators that ways to quantize need, and attention in the ways that runtimes use it."""
    folder = models_folder(place)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rng = np.random.default_rng(0)
    made = list(models(rng))
    for number, (_, model) in enumerate(made):
        save(folder / f"{number}.onnx", model)
        np.savez(folder / f"{number}.npz", **model.inputs)  # type: ignore[arg-type]
    lines = place.run("single.py", folder.name).splitlines()
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    for (name, model), answer in zip(made, answers, strict=True):
        yield _case(name, model, answer)


def models_folder(place: Place) -> Path:
    """Return the folder of the models, which are numbered in the order of `models`."""
    return place.root.work / "operators"


def _case(name: str, model: Model, answer: Mapping[str, Any]) -> Case:
    if "error" in answer:
        return Case(name, False, answer["error"])
    elsewhere = sorted(op for op, where in answer["where"].items() if where != DIRECTML)
    right = answer["difference"] <= answer["largest"] / 256  # fp16 rounds to 1 / 2048
    said = "right" if right else "**wrong**"
    said += f": off by {answer['difference']:.2g}, the largest value is {answer['largest']:.2g}"
    at_load = sorted({node.op_type for node in model.nodes} & AT_LOAD - answer["where"].keys())
    said += f"; {' and '.join(at_load)} computed at load" if at_load else ""
    if elsewhere:
        said = f"no kernel: {', '.join(elsewhere)} ran on the CPU"
    return Case(name, (right and not elsewhere) != (name in WRONG), said)


def models(rng: np.random.Generator) -> Iterator[tuple[str, Model]]:
    """Yield each model and what it is about."""
    for matmul in MATMULS:
        yield matmul.what, _matmul(matmul, rng)
    for bits in (4, 8):
        yield f"embedding, GatherBlockQuantized of {bits} bits", _gather_blocks(bits, rng)
    yield "embedding of 8 bits: Gather, Cast, Sub, Mul", _embedding(8, rng)
    yield "embedding of 4 bits: the same, with BitwiseAnd and BitShift", _embedding(4, rng)
    yield NARROW_NORM, _norm(rng, wide=False)
    yield (
        "Add, Cast to fp32, SimplifiedLayerNormalization, with the same",
        _norm(rng, wide=True),
    )
    for attention in ATTENTIONS:
        yield attention.what, _attention(attention, rng)


def _matmul(matmul: Matmul, rng: np.random.Generator) -> Model:
    model, blocks = Model(dtype=matmul.dtype), -(-matmul.columns // matmul.block)
    model.inputs["x"] = rng.standard_normal((1, 3, matmul.columns)).astype(matmul.dtype)
    shape = (ROWS, blocks, matmul.block * matmul.bits // 8)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    if matmul.codes == "rows":
        model.weights.update({"rows": codes.reshape(ROWS, -1), "shape": np.array(shape, np.int64)})
        model.nodes.append(oh.make_node("Reshape", ["rows", "shape"], ["codes"]))
    else:
        model.weights["codes"] = codes
    inputs = ["x", "codes", _scales(matmul, (ROWS, blocks), model, rng)]
    if matmul.zeros == "uint8":
        packed = (ROWS, -(-blocks * matmul.bits // 8))
        model.weights["zeros"] = rng.integers(0, 256, packed, dtype=np.uint8)
    elif matmul.zeros:
        model.weights["zeros"] = (16 * rng.random((ROWS, blocks))).astype(matmul.zeros)
    inputs += ["zeros"] if matmul.zeros else []
    sizes: dict[str, Any] = {"N": ROWS, "K": matmul.columns}
    sizes |= {"bits": matmul.bits, "block_size": matmul.block}
    model.nodes.append(oh.make_node("MatMulNBits", inputs, ["y"], domain=MICROSOFT, **sizes))
    return model


def _scales(matmul: Matmul, shape: tuple[int, int], model: Model, rng: np.random.Generator) -> str:
    """Add scales to `model`, in the way that `matmul` stores them, and return their name."""
    scales = (0.02 * rng.random(shape) + 0.01).astype(np.float16)
    needed = oh.np_dtype_to_tensor_dtype(np.dtype(matmul.dtype))
    if matmul.scales == "plain":
        model.weights["scales"] = scales.astype(matmul.dtype)
        return "scales"
    if matmul.scales == "cast":
        stored = np.float32 if matmul.dtype is np.float16 else np.float16
        model.weights["stored"] = scales.astype(stored)
    else:
        model.weights["steps"] = rng.integers(1, 256, shape, dtype=np.uint8)
        model.weights["unit"] = (1e-4 * rng.random((shape[0], 1)) + 1e-5).astype(np.float16)
        for name in ("steps", "unit"):
            node = oh.make_node("Cast", [name], [f"{name} wide"], to=TensorProto.FLOAT)
            model.nodes.append(node)
        model.nodes.append(oh.make_node("Mul", ["steps wide", "unit wide"], ["stored"]))
    model.nodes.append(oh.make_node("Cast", ["stored"], ["scales"], to=needed))
    return "scales"


def _ids() -> Arrays:
    return {"x": np.array([[3, 7, 49]], np.int64)}


def _gather_blocks(bits: int, rng: np.random.Generator) -> Model:
    model = Model(inputs=_ids())
    model.weights["codes"] = rng.integers(0, 256, (50, 8 * bits), dtype=np.uint8)
    model.weights["scales"] = (0.01 * rng.random((50, 2))).astype(np.float16)
    sizes: dict[str, Any] = {"bits": bits, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    inputs = ["codes", "x", "scales"]
    model.nodes.append(
        oh.make_node("GatherBlockQuantized", inputs, ["y"], domain=MICROSOFT, **sizes)
    )
    return model


def _embedding(bits: int, rng: np.random.Generator) -> Model:
    """Rows of codes in blocks of 32, unpacked and scaled by plain operators."""
    model, node = Model(inputs=_ids()), oh.make_node
    model.weights.update(
        {
            "codes": rng.integers(0, 256, (50, 2, 4 * bits), dtype=np.uint8),
            "scales": (0.01 * rng.random((50, 2, 1))).astype(np.float16),
            "zero": np.array(1 << (bits - 1), np.float16),
        }
    )
    model.nodes.append(node("Gather", ["codes", "x"], ["rows"]))
    model.nodes.append(node("Gather", ["scales", "x"], ["s"]))
    if bits == 4:
        model.weights.update({"mask": np.array(15, np.uint8), "four": np.array(4, np.uint8)})
        model.nodes.append(node("BitwiseAnd", ["rows", "mask"], ["low"]))
        model.nodes.append(node("BitShift", ["rows", "four"], ["high"], direction="RIGHT"))
        model.nodes.append(node("Concat", ["low", "high"], ["numbers"], axis=-1))
    numbers = "numbers" if bits == 4 else "rows"
    model.nodes.append(node("Cast", [numbers], ["float"], to=TensorProto.FLOAT16))
    model.nodes.append(node("Sub", ["float", "zero"], ["centered"]))
    model.nodes.append(node("Mul", ["centered", "s"], ["y"]))
    return model


def _norm(rng: np.random.Generator, *, wide: bool) -> Model:
    """The norm of x + x, in fp16 or, if `wide`, in fp32."""
    model, node = Model(), oh.make_node
    model.inputs["x"] = rng.standard_normal((1, 3, 576)).astype(np.float16)
    model.inputs["x"][..., 7] = 20000
    model.weights["gain"] = np.ones(576, np.float16)
    if wide:
        model.nodes.append(node("Add", ["x", "x"], ["sum"]))
        model.nodes.append(node("Cast", ["sum"], ["wide"], to=TensorProto.FLOAT))
        norm = node("SimplifiedLayerNormalization", ["wide", "gain"], ["y"], epsilon=1e-5)
    else:
        name, inputs = "SkipSimplifiedLayerNormalization", ["x", "x", "gain"]
        norm = node(name, inputs, ["y"], domain=MICROSOFT, epsilon=1e-5)
    model.nodes.append(norm)
    return model


def _attention(attention: Attention, rng: np.random.Generator) -> Model:
    heads, groups, size, room = 4, 2, 16, 32
    outputs = ["y", "present_key", "present_value"]
    if not attention.shared:
        outputs = ["attended", "y", "present_value"]
    model = Model(outputs=tuple(outputs[1:]) if attention.shared else ())
    filled = attention.past + (2 if attention.stale else 0)
    for name, count in (("query", heads), ("key", groups), ("value", groups)):
        shape = (1, attention.new, count * size)
        model.inputs[name] = rng.standard_normal(shape).astype(np.float16)
    for name in ("past_key", "past_value"):
        past = rng.standard_normal((1, groups, room, size)).astype(np.float16)
        past[:, :, filled:] = 0
        model.inputs[name] = past
    total = attention.past + attention.new
    model.inputs.update(
        {"last": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
    )
    node = oh.make_node(
        "GroupQueryAttention",
        ["query", "key", "value", "past_key", "past_value", "last", "total"],
        outputs,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=groups,
    )
    model.nodes.append(node)
    return model


def save(file: Path, model: Model) -> None:
    """Write `model`, with free dimensions."""
    dtype = oh.np_dtype_to_tensor_dtype(np.dtype(model.dtype))
    outputs = dict.fromkeys(("y", *model.outputs), dtype)
    onnx.save(operator_model(model.nodes, model.weights, model.inputs, outputs), file)
