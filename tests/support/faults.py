"""Faults planted in packages, and the checks that must find each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.graph.rotary import rotary_tables
from tests.support import tiny
from tests.support.packages import renew_hashes

Graph = onnx.GraphProto
Array = np.ndarray

HEADS, KV_HEADS, DIM = (
    tiny.GQA.num_attention_heads,
    tiny.GQA.num_key_value_heads,
    tiny.GQA.head_dim,
)

# Where a tensor stands in the data file, and what can be done to it


def edit(package: Path, name: str, change: Callable[[Array], None]) -> None:
    """Apply `change` to the initializer `name` of `package` in place. A rotary table that the graph
    computes is stored first."""
    model = onnx.load(package / "model.onnx", load_external_data=False)
    if name.endswith("_cache.weight") and any(node.op_type == "Cos" for node in model.graph.node):
        _store_tables(package, model)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    entries = {entry.key: entry.value for entry in tensor.external_data}
    mapped = np.memmap(
        package / entries["location"],
        helper.tensor_dtype_to_np_dtype(tensor.data_type),
        mode="r+",
        offset=int(entries["offset"]),
        shape=tuple(tensor.dims),
    )
    change(mapped)
    mapped.flush()


def _store_tables(package: Path, model: onnx.ModelProto) -> None:
    """Put the rotary tables that the graph computes into the data file."""
    graph, data = model.graph, package / "model.onnx.data"
    config = PackageCheckpoint.open(package).config
    made = [node for node in graph.node if node.name.startswith("model/")
            and node.name.count("/") == 1 and node.op_type in ("Mul", "Cos", "Sin")]  # fmt: skip
    last = [node.output[0] for node in made][-2:]  # cosines before sines
    for node in made:
        graph.node.remove(node)
    for table, name, value in zip(rotary_tables(config), ("cos", "sin"), last, strict=True):
        stored = f"model.{name}_cache.weight"
        offset = -(-data.stat().st_size // 4096) * 4096
        with data.open("r+b") as file:
            file.seek(offset)
            file.write(table.tobytes())
        tensor = onnx.TensorProto(name=stored, data_type=onnx.TensorProto.FLOAT, dims=table.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": data.name, "offset": str(offset), "length": str(table.nbytes)}
        for key, text in place.items():
            tensor.external_data.add(key=key, value=text)
        graph.initializer.append(tensor)
        for node in graph.node:
            node.input[:] = [stored if read == value else read for read in node.input]
    onnx.save(model, package / "model.onnx")
    renew_hashes(package)


def edit_graph(package: Path, change: Callable[[Graph], None]) -> None:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    change(model.graph)
    onnx.save(model, package / "model.onnx")


def node_of(graph: Graph, scope: str, op_type: str) -> onnx.NodeProto:
    """Return the node with `op_type` directly in module `scope`, such as "layers.1/self_attn"."""
    nodes: list[onnx.NodeProto] = [n for n in graph.node if n.op_type == op_type]
    return next(n for n in nodes if n.name.rpartition("/")[0].endswith(scope))


def insert_before(graph: Graph, node: onnx.NodeProto, *added: onnx.NodeProto) -> None:
    index = list(graph.node).index(node)
    nodes = [*graph.node[:index], *added, *graph.node[index:]]
    del graph.node[:]
    graph.node.extend(nodes)


def _set(node: onnx.NodeProto, name: str, value: float | int) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _is_blocks(package: Path, module: str) -> bool:
    model = onnx.load(package / "model.onnx", load_external_data=False)
    return any(t.name == f"{module}.qweight" for t in model.graph.initializer)


# Weights


def negate(array: Array) -> None:
    np.negative(array, out=array)


def _matrix(module: str, *, plain: Callable[[Array], None], codes: Callable[[Array], None] | None,
            scales: Callable[[Array], None] | None = None) -> Callable[[Path], None]:  # fmt: skip
    """Return a fault of matrix `module`, stored as floats or as blocks."""

    def plant(package: Path) -> None:
        if not _is_blocks(package, module):
            edit(package, f"{module}.weight", plain)
            return
        if codes:
            edit(package, f"{module}.qweight", codes)
        if scales:
            edit(package, f"{module}.scales", scales)

    return plant


def _one_sign(array: Array) -> None:
    """Negate one weight: row 5, column 32."""
    if array.dtype != np.uint8:
        array[5, 32] *= -1
    elif array.shape[2] == 32:  # one byte per code
        array[5, 1, 0] = np.uint8((256 - int(array[5, 1, 0])) % 256)
    else:
        first = int(array[5, 1, 0]) & 15
        # -8 becomes 7, because there is no 8; a zero cannot be negated.
        turned = min(16 - first, 15) if first != 8 else 11
        array[5, 1, 0] = (array[5, 1, 0] & 0xF0) | turned


def _swap_kv(array: Array) -> None:
    q, kv = HEADS * DIM, KV_HEADS * DIM
    array[q:] = np.concatenate([array[q + kv :], array[q : q + kv]])


def _times(factor: float, part: slice | tuple[int, int]) -> Callable[[Array], None]:
    def scale(array: Array) -> None:
        array[part] *= array.dtype.type(factor)

    return scale


def _swap_rows(array: Array) -> None:
    array[[10, 11]] = array[[11, 10]]


def _swap_query_heads(array: Array) -> None:
    heads = array[: HEADS * DIM].reshape(HEADS, DIM, *array.shape[1:]).copy()
    array[: HEADS * DIM] = heads[[0, 2, 1, 3]].reshape(HEADS * DIM, *array.shape[1:])


def _swap_blocks(array: Array) -> None:
    array[:] = array[:, ::-1].copy()


def _swap_halves(array: Array) -> None:
    array[:, :64] = array[:, :64].reshape(len(array), 2, 32)[:, ::-1].reshape(len(array), 64)


def _gain(package: Path) -> None:
    edit(package, "model.layers.1.input_layernorm.weight", _times(1.02, slice(None)))


def _flip_bit(package: Path) -> None:
    """Flip the lowest bit of one byte in the middle of the data file."""
    data = package / "model.onnx.data"
    with data.open("r+b") as file:
        file.seek(data.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


# Rotary tables


def _shift_tables(package: Path) -> None:
    for table in ("cos", "sin"):
        edit(package, f"model.{table}_cache.weight", _shift)


def _shift(table: Array) -> None:
    table[:-1] = table[1:].copy()


def _shift_cos(package: Path) -> None:
    edit(package, "model.cos_cache.weight", _shift)


def _one_angle(position: int) -> Callable[[Path], None]:
    def change(table: Array) -> None:
        table[position, 3] += 0.01

    return lambda package: edit(package, "model.cos_cache.weight", change)


# The graph


def epsilon(graph: Graph) -> None:
    _set(node_of(graph, "layers.1/post_attention_layernorm", _SKIP), "epsilon", 1e-3)


_SKIP = "SkipSimplifiedLayerNormalization"


def interleaved(graph: Graph) -> None:
    _set(node_of(graph, "layers.0/self_attn", "GroupQueryAttention"), "rotary_interleaved", 1)


def _attention_scale(graph: Graph) -> None:
    _set(node_of(graph, "layers.2/self_attn", "GroupQueryAttention"), "scale", 0.26)


def _window(graph: Graph) -> None:
    _set(node_of(graph, "layers.1/self_attn", "GroupQueryAttention"), "local_window_size", 8)


def _alpha(graph: Graph) -> None:
    _set(node_of(graph, "layers.2/mlp", "QuickGelu"), "alpha", 1.702)


def _rearrange(
    layer: int, name: str, sizes: list[int], order: list[int]
) -> Callable[[Graph], None]:
    """Put the packed queries, keys and values, which are of `sizes`, into another `order`."""

    def change(graph: Graph) -> None:
        attention = node_of(graph, f"layers.{layer}/self_attn", "GroupQueryAttention")
        scope = f"model/layers.{layer}/self_attn"
        ends = np.cumsum(sizes)
        places = np.concatenate([np.arange(ends[i] - sizes[i], ends[i]) for i in order])
        graph.initializer.append(numpy_helper.from_array(places, f"{name}_places"))
        gather = helper.make_node(
            "Gather", [attention.input[0], f"{name}_places"], [name], f"{scope}/{name}", axis=-1
        )
        attention.input[0] = name
        insert_before(graph, attention, gather)

    return change


def _swap_cached(graph: Graph) -> None:
    """Swap the keys and values that leave a layer."""
    node = node_of(graph, "layers.1/self_attn", "GroupQueryAttention")
    node.output[1], node.output[2] = node.output[2], node.output[1]


def double_cached_keys(graph: Graph) -> None:
    """Double the keys of layer 0 that leave the graph: a pass without a past is not affected."""
    node = node_of(graph, "layers.0/self_attn", "GroupQueryAttention")
    node.output[list(node.output).index("present.0.key")] = "key"
    graph.initializer.append(numpy_helper.from_array(np.array(2, np.float32), "two"))
    name = "model/layers.0/self_attn/double"
    graph.node.append(helper.make_node("Mul", ["key", "two"], ["present.0.key"], name))


def _other_cache(graph: Graph) -> None:
    """Make layer 2 read the cached keys of layer 1."""
    node_of(graph, "layers.2/self_attn", "GroupQueryAttention").input[3] = "past_key_values.1.key"


def _no_residual(graph: Graph) -> None:
    node = node_of(graph, "layers.1/post_attention_layernorm", _SKIP)
    node.input[1] = node.input[0]


def _old_residual(graph: Graph) -> None:
    """Pass on the residual of the layer's input without the attention's output."""
    here = node_of(graph, "layers.1/post_attention_layernorm", _SKIP)
    node_of(graph, "layers.2/input_layernorm", _SKIP).input[1] = here.input[1]


def _swap_gate_up(graph: Graph) -> None:
    gelu, product = (node_of(graph, "layers.1/mlp", op) for op in ("QuickGelu", "Mul"))
    gelu.input[0], product.input[1] = product.input[1], gelu.input[0]


def _swap_matrices(graph: Graph) -> None:
    """Make gate_proj and up_proj multiply by each other's matrix."""
    swapped = {"mlp.gate_proj.": "mlp.up_proj.", "mlp.up_proj.": "mlp.gate_proj."}
    for node in graph.node:
        for index, name in enumerate(node.input):
            for mine, other in swapped.items():
                if name.startswith(f"model.layers.1.{mine}"):
                    node.input[index] = name.replace(mine, other)


def _maker(graph: Graph, value: str) -> onnx.NodeProto:
    nodes: list[onnx.NodeProto] = list(graph.node)
    return next(node for node in nodes if value in node.output)


def _not_rotated(graph: Graph) -> None:
    """Do not rotate left padding away: positions count it."""
    gather = next(n for n in graph.node if n.op_type == "GatherElements")
    add = _maker(graph, _maker(graph, gather.input[1]).input[0])
    zero = helper.make_node("Mul", [add.input[1], "const_0_i64"], ["none"], "no_padding")
    add.input[1] = "none"
    insert_before(graph, add, zero)


def _not_rotated_back(graph: Graph) -> None:
    """Return the logits of the position that the token has without padding."""
    front = next(n for n in graph.node if n.op_type == "GatherElements").input[1]
    back = next(n for n in graph.node if n.op_type == "GatherND").input[1]
    _maker(graph, back).input[0] = front


def _off_by_one(graph: Graph) -> None:
    """Set every row's length one too high."""
    attention = node_of(graph, "layers.0/self_attn", "GroupQueryAttention")
    _maker(graph, _maker(graph, attention.input[5]).input[0]).input[1] = "const_0_i64"


_LENGTHS = ("longer", "width")


def _off_by_one_if_padded(graph: Graph) -> None:
    """The same, but at most the length of the longest row of the batch."""
    attention = node_of(graph, "layers.0/self_attn", "GroupQueryAttention")
    subtract = _maker(graph, _maker(graph, attention.input[5]).input[0])
    width = helper.make_node("Shape", ["attention_mask"], ["width"], "width", start=1, end=2)
    longer = helper.make_node("Add", [subtract.input[0], "const_1_i64"], ["longer"], "longer")
    # The smaller one, with operators that a package may have: -max(-a, -b).
    parts = [helper.make_node("Neg", [name], [f"-{name}"], f"-{name}") for name in _LENGTHS]
    most = helper.make_node("Max", [f"-{name}" for name in _LENGTHS], ["most"], "most")
    at_most = helper.make_node("Neg", ["most"], ["at_most"], "at_most")
    subtract.input[0] = "at_most"
    insert_before(graph, subtract, width, longer, *parts, most, at_most)


def _no_mask(graph: Graph) -> None:
    """Count the padding in the lengths of the rows."""
    attention = node_of(graph, "layers.0/self_attn", "GroupQueryAttention")
    subtract = _maker(graph, _maker(graph, attention.input[5]).input[0])
    count = _maker(graph, subtract.input[0])
    zeros = helper.make_node("Sub", ["attention_mask", "attention_mask"], ["zeros"], "zeros")
    ones = helper.make_node("Add", ["zeros", "const_1_i64"], ["ones"], "ones")
    count.input[0] = "ones"
    insert_before(graph, count, zeros, ones)


def _tokenizer(package: Path) -> None:
    """Replace tokenizer.json by one of another model with a vocabulary of the same size."""
    content = json.loads((package / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (package / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


stale_tokenizer = _tokenizer


def _graph(change: Callable[[Graph], None]) -> Callable[[Path], None]:
    return lambda package: edit_graph(package, change)


@dataclass(frozen=True)
class Fault:
    """A fault that `plant` puts into a package.

    `found_by` are the measures that must miss their limit ("integrity": `ModelPackage.verify`;
    "refused": `validate` ends with an error that describes the fault). `layer` and `op` are what
    bisect must name for a fault of weights or graph: `op` is part of the name of one of its nodes.
    """

    name: str
    plant: Callable[[Path], None]
    found_by: tuple[str, ...]
    layer: str = ""
    op: str = ""
    precisions: tuple[str, ...] = ("fp32", "int8", "int4")


_BLOCKS = ("int8", "int4")
_O = "model.layers.1.self_attn.o_proj"
_QKV = "model.layers.1.self_attn.qkv_proj"
_DOWN = "model.layers.2.mlp.down_proj"
_HEAD = "lm_head"
_ALL = slice(None)
_PARTS = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]

FAULTS = (
    Fault("sign of one weight", _matrix(_O, plain=_one_sign, codes=_one_sign),
          ("weights",), "layer 1", "self_attn/o_proj/"),
    Fault("signs of one block of 32 weights",
          _matrix(_DOWN, plain=lambda a: negate(a[5, 32:64]), codes=None,
                  scales=lambda a: negate(a[5, 1:2])),
          ("weights",), "layer 2", "mlp/down_proj/"),
    Fault("one block's scale off by 2 %",
          _matrix(_DOWN, plain=_times(1.02, (5, 33)), codes=None, scales=_times(1.02, (5, 1))),
          ("weights",), "layer 2", "mlp/down_proj/", _BLOCKS),
    Fault("one matrix's scales off by 2 %",
          _matrix(_O, plain=_times(1.02, _ALL), codes=None, scales=_times(1.02, _ALL)),
          ("weights",), "layer 1", "self_attn/o_proj/"),
    Fault("blocks of a matrix in reverse order",
          _matrix(_O, plain=_swap_halves, codes=_swap_blocks, scales=_swap_blocks),
          ("weights",), "layer 1", "self_attn/o_proj/"),
    Fault("k and v swapped in the packed weights",
          _matrix(_QKV, plain=_swap_kv, codes=_swap_kv, scales=_swap_kv),
          ("weights",), "layer 1", "self_attn/qkv_proj/"),
    Fault("query heads grouped with other KV heads, in the weights",
          _matrix(_QKV, plain=_swap_query_heads, codes=_swap_query_heads,
                  scales=_swap_query_heads),
          ("weights",), "layer 1", "self_attn/qkv_proj/"),
    Fault("two tokens' rows of the embedding swapped",
          _matrix("model.embed_tokens", plain=_swap_rows, codes=_swap_rows, scales=_swap_rows),
          ("weights",), "embedding", "embed_tokens/"),
    Fault("two tokens' rows of the head swapped",
          _matrix(_HEAD, plain=_swap_rows, codes=_swap_rows, scales=_swap_rows),
          ("weights",), "head", "lm_head/"),
    Fault("a norm's gain off by 2 %", _gain, ("weights",), "layer 1", "input_layernorm/"),
    Fault("rotary tables shifted by one position", _shift_tables,
          ("rotary",), "layer 0", "GroupQueryAttention"),
    Fault("cosines alone shifted by one position", _shift_cos,
          ("rotary",), "layer 0", "GroupQueryAttention"),
    Fault("one rotary angle off, within the prompts", _one_angle(9),
          ("rotary",), "layer 0", "GroupQueryAttention"),
    Fault("one rotary angle off, farther than any prompt", _one_angle(200),
          ("rotary",), "layer 0", "GroupQueryAttention"),
    Fault("rotary pairs interleaved", _graph(interleaved),
          ("graph",), "layer 0", "GroupQueryAttention"),
    Fault("a norm's epsilon 1e-3, not 1e-5", _graph(epsilon),
          ("graph",), "layer 1", "post_attention_layernorm/"),
    Fault("k and v swapped in the graph", _graph(_rearrange(1, "swapped", _PARTS, [0, 2, 1])),
          ("graph",), "layer 1", "self_attn/swapped"),
    Fault("query heads grouped with other KV heads, in the graph",
          _graph(_rearrange(1, "regrouped", [DIM] * 4 + _PARTS[1:], [0, 2, 1, 3, 4, 5])),
          ("graph",), "layer 1", "self_attn/regrouped"),
    Fault("attention scaled by 0.26, not 0.25", _graph(_attention_scale),
          ("graph",), "layer 2", "GroupQueryAttention"),
    Fault("attention sees the last 8 positions only", _graph(_window),
          ("graph",), "layer 1", "GroupQueryAttention"),
    Fault("cache: keys and values swapped on the way out", _graph(_swap_cached),
          ("graph",), "layer 1", "GroupQueryAttention"),
    Fault("cache: keys doubled on the way out", _graph(double_cached_keys),
          ("graph",), "layer 0", "self_attn/double"),
    Fault("cache: another layer's keys read", _graph(_other_cache),
          ("refused",)),
    Fault("residual dropped before a norm", _graph(_no_residual),
          ("graph",), "layer 1", "post_attention_layernorm/"),
    Fault("residual without the attention's part", _graph(_old_residual),
          ("graph",), "layer 2", "input_layernorm/"),
    Fault("SiLU with alpha 1.702", _graph(_alpha), ("graph",), "layer 2", "mlp/QuickGelu"),
    Fault("gate and up swapped at the activation", _graph(_swap_gate_up),
          ("graph",), "layer 1", "mlp/QuickGelu"),
    Fault("gate and up multiply by each other's matrix", _graph(_swap_matrices),
          ("graph",), "layer 1", "mlp/gate_proj/"),
    Fault("padding mask: left padding not rotated away", _graph(_not_rotated),
          ("graph",), "embedding", "no_padding"),
    Fault("padding mask: lengths off by one", _graph(_off_by_one),
          ("refused",)),
    Fault("padding mask: lengths of padded rows off by one", _graph(_off_by_one_if_padded),
          ("graph",), "embedding", "longer"),
    Fault("padding mask: lengths count the padding", _graph(_no_mask),
          ("graph",), "embedding", "ones"),
    Fault("logits of another position under left padding", _graph(_not_rotated_back),
          ("graph",), "head", "Unsqueeze_node"),
    Fault("one bit of the data file flipped", _flip_bit, ("integrity",)),
    Fault("tokenizer of another model", _tokenizer, ("tokenizer", "integrity")),
)  # fmt: skip
