"""Single operators on WebGPU against the CPU provider, by the number of lanes in a subgroup.

    python -m benchmarks.trials.webgpu_operators

Prints relative L2 for random inputs on Vulkan's own device; Mesa's llvmpipe has subgroups of 4, 8
or 16 lanes (LP_NATIVE_VECTOR_WIDTH). Exit status 1 if an operator that our packages have is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh

from benchmarks.trials.operator_model import MICROSOFT, operator_model
from llama_onnx.exporter.graph.fused import EMPTY_SINK
from llama_onnx.targets.providers import CPU, WEBGPU

LANES = (4, 8, 16)
HEADS, GROUPS, BLOCK = 4, 2, 32
COLUMNS, ROWS = 256, 192
LIMITS = {"float32": 1e-5, "float16": 2.0**-8}
"""Relative L2 up to which an operator is right: in float16, 8 of its rounding errors."""

Arrays = dict[str, np.ndarray]
Entry = tuple[str, str, Arrays, Arrays, dict[str, Any]]


@dataclass(frozen=True)
class Operator:
    """A node on random values. `ours`: packages for WebGPU have it so. `valid`: the numbers of
    valid tokens in the rows of `y` (None: all)."""

    what: str
    ours: bool
    node: onnx.NodeProto
    weights: Arrays
    inputs: Arrays
    valid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Attention:
    """`new` tokens after `past`, in buffers with room for `room` (0: no more than the past).
    `lengths`: the valid positions of each row, the new ones included."""

    what: str
    new: int
    past: int = 0
    room: int = 0
    lengths: tuple[int, ...] = ()


ATTENTIONS = (
    Attention("prompt of 4", 4),
    Attention("prompt of 8", 8),
    Attention("prompt of 9", 9),
    Attention("prompt of 33", 33),
    Attention("1 token after 9", 1, 9),
    Attention("6 tokens after 9", 6, 9),
    Attention("6 tokens after 9, room for 64", 6, 9, 64),
    Attention("rows of 9 and 5 tokens", 9, lengths=(9, 5)),
    Attention("1 token after rows of 9 and 5", 1, 9, lengths=(10, 6)),
)


def operators(dtype: type) -> Iterator[Operator]:
    """The operators of our graphs, and attention in forms that they do not have."""
    rng = np.random.default_rng(0)
    for size in (16, 32, 64, 128):
        for one in ATTENTIONS:
            yield _attention(rng, dtype, size, one, rotary=False, sink=True)
    for rotary, sink in ((False, False), (True, False), (True, True)):
        for one in ATTENTIONS:
            yield _attention(rng, dtype, 64, one, rotary=rotary, sink=sink)
    for size in (16, 32, 64, 128):
        yield _rotary(rng, dtype, size)
    for bits in (4, 8):
        for tokens in (1, 2, 9, 33):
            yield _matmul(rng, dtype, bits, tokens)
        yield _embedding(rng, dtype, bits)
    yield from _others(rng, dtype)


def _attention(
    rng: np.random.Generator, dtype: type, size: int, case: Attention, *, rotary: bool, sink: bool
) -> Operator:
    rows, room = len(case.lengths) or 1, case.room or case.past
    inputs = {
        name: _random(rng, dtype, rows, case.new, heads * size)
        for name, heads in (("query", HEADS), ("key", GROUPS), ("value", GROUPS))
    }
    for name in ("past_key", "past_value"):
        inputs[name] = np.zeros((rows, GROUPS, room, size), dtype)
        inputs[name][:, :, : case.past] = _random(rng, dtype, rows, GROUPS, case.past, size)
    total = case.past + case.new
    inputs["lengths"] = np.array([n - 1 for n in case.lengths or (total,)], np.int32)
    weights = {"total": np.array(total, np.int32)}
    names = [*inputs, "total", "", "", "", "", ""]
    attributes: dict[str, Any] = {
        "num_heads": HEADS,
        "kv_num_heads": GROUPS,
        "do_rotary": int(rotary),
    }
    if rotary:
        names[7:9] = ["cos", "sin"]
        weights |= _tables(size, dtype)
    if sink:
        names[11:] = ["sink"]
        weights["sink"] = np.full(HEADS, EMPTY_SINK, dtype)
        attributes["smooth_softmax"] = 1
    node = oh.make_node(
        "GroupQueryAttention", names, ["y", "k", "v"], domain=MICROSOFT, **attributes
    )
    form = f"{'inner rotary, ' if rotary else ''}{'sink' if sink else 'no sink'}"
    what = f"GroupQueryAttention, {form}, heads of {size}: {case.what}"
    valid = case.lengths if case.lengths and case.new > 1 else None
    return Operator(what, sink and not rotary, node, weights, inputs, valid)


def _tables(size: int, dtype: type) -> Arrays:
    frequencies = 1e4 ** (-np.arange(size // 2) / (size / 2))
    angles = np.outer(np.arange(128), frequencies)
    return {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}


def _rotary(rng: np.random.Generator, dtype: type, size: int) -> Operator:
    inputs = {"x": _random(rng, dtype, 1, 9, HEADS * size), "ids": np.arange(3, 12)[None]}
    names = ["x", "ids", "cos", "sin"]
    node = oh.make_node("RotaryEmbedding", names, ["y"], domain=MICROSOFT)
    what = f"RotaryEmbedding, heads of {size}"
    return Operator(what, True, node, _tables(size, dtype), inputs)


def _matmul(rng: np.random.Generator, dtype: type, bits: int, tokens: int) -> Operator:
    shape = (ROWS, COLUMNS // BLOCK)
    weights = {
        "codes": rng.integers(0, 256, (*shape, BLOCK * bits // 8), np.uint8),
        "scales": (rng.random(shape) * 0.02 + 0.01).astype(dtype),
    }
    node = oh.make_node(
        "MatMulNBits",
        ["x", *weights],
        ["y"],
        domain=MICROSOFT,
        K=COLUMNS,
        N=ROWS,
        bits=bits,
        block_size=BLOCK,
    )
    what = f"MatMulNBits, {bits} bits: {tokens} tokens"
    return Operator(what, True, node, weights, {"x": _random(rng, dtype, 1, tokens, COLUMNS)})


def _embedding(rng: np.random.Generator, dtype: type, bits: int) -> Operator:
    weights = {
        "codes": rng.integers(0, 256, (ROWS, COLUMNS * bits // 8), np.uint8),
        "scales": rng.random((ROWS, COLUMNS // BLOCK)).astype(dtype),
    }
    node = oh.make_node(
        "GatherBlockQuantized",
        ["codes", "ids", "scales"],
        ["y"],
        domain=MICROSOFT,
        bits=bits,
        block_size=BLOCK,
        gather_axis=0,
        quantize_axis=1,
    )
    ids = rng.integers(0, ROWS, (1, 9))
    return Operator(f"GatherBlockQuantized, {bits} bits", True, node, weights, {"ids": ids})


def _others(rng: np.random.Generator, dtype: type) -> Iterator[Operator]:
    x, other = (_random(rng, dtype, 1, 9, COLUMNS) for _ in range(2))
    gain, matrix = _random(rng, dtype, COLUMNS), _random(rng, dtype, COLUMNS, ROWS)
    both, epsilon = {"x": x, "o": other}, {"epsilon": 1e-5}
    nodes: tuple[Entry, ...] = (
        ("SimplifiedLayerNormalization", "", {"gain": gain}, {"x": x}, {**epsilon, "axis": -1}),
        ("SkipSimplifiedLayerNormalization", MICROSOFT, {"gain": gain}, both, epsilon),
        ("MatMul", "", {"matrix": matrix}, {"x": x}, {}),
        ("QuickGelu", MICROSOFT, {}, {"x": x}, {"alpha": 1.0}),
        ("Mul", "", {}, both, {}),
    )
    for name, domain, weights, inputs, attributes in nodes:
        node = oh.make_node(name, [*inputs, *weights], ["y"], domain=domain, **attributes)
        yield Operator(name, True, node, weights, inputs)


def _random(rng: np.random.Generator, dtype: type, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def measure() -> list[dict[str, Any]]:
    """Return each operator's relative L2 on this process's device."""
    found: list[dict[str, Any]] = []
    for dtype in (np.float32, np.float16):
        for one in operators(dtype):
            expected, given = (_run(one, dtype, provider.ort_name) for provider in (CPU, WEBGPU))
            if one.valid is not None:
                expected, given = (
                    np.concatenate([y[row, :n] for row, n in enumerate(one.valid)])
                    for y in (expected, given)
                )
            by = float(np.linalg.norm(given - expected) / np.linalg.norm(expected))
            what = f"{np.dtype(dtype).name}, {one.what}"
            found.append({"what": what, "by": by, "ours": one.ours})
    return found


def _run(one: Operator, dtype: type, provider: str) -> np.ndarray:
    """Return `y` in double precision. Raises unless the node is on `provider`."""
    import onnxruntime as ort

    kind = oh.np_dtype_to_tensor_dtype(np.dtype(dtype))
    outputs = dict.fromkeys(one.node.output, kind)
    model = operator_model([one.node], one.weights, one.inputs, outputs)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if provider != CPU.ort_name:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, [provider], enable_fallback=0
    )
    return np.asarray(session.run(["y"], one.inputs)[0], np.float64)


def environments() -> Mapping[str, Mapping[str, str]]:
    """Return heading -> environment variables."""
    return {f"{n} lanes": {"LP_NATIVE_VECTOR_WIDTH": str(32 * n)} for n in LANES}


def _row(values: list[float], row: Mapping[str, Any]) -> tuple[str, bool]:
    """Return a line of the table, and False if it is about an operator of ours that is wrong."""
    limit = LIMITS[row["what"].partition(",")[0]]
    right = [value <= limit for value in values]
    cells = [f"{v:.1e}" if good else f"**{v:.1e}**" for v, good in zip(values, right, strict=True)]
    ours = "yes" if row["ours"] else ""
    return f"| {row['what']} | {ours} | {' | '.join(cells)} |", all(right) or not row["ours"]


def main() -> None:
    """Print the table; exit status 1 if an operator of our packages is wrong."""
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
        return
    columns = []
    for environment in environments().values():
        command = [sys.executable, "-m", "benchmarks.trials.webgpu_operators", "--measure"]
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr.strip().splitlines()[-1])
        columns.append(json.loads(done.stdout))
    print("| operator | ours |", " | ".join(environments()), "|")
    print("| --- |" + " --- |" * (1 + len(columns)))
    rows = [_row([one["by"] for one in found], found[0]) for found in zip(*columns, strict=True)]
    print("\n".join(line for line, _ in rows))
    wrong = sum(not right for _, right in rows)
    if wrong:
        sys.exit(f"{wrong} operators of our packages are wrong.")


if __name__ == "__main__":
    main()
