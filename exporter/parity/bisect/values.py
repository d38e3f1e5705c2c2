"""Maps values of a package's graph to PyTorch's points, with the layout of their positions.

Not every value needs a point: the nodes between two values that have one are treated as one piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.graph import names as graph_names
from llama_onnx.exporter.parity.bisect import points as pt
from llama_onnx.exporter.parity.bisect.points import Points
from llama_onnx.exporter.reference.segments import moves_padding
from llama_onnx.runtime.measure.situations import Step
from llama_onnx.targets.graph_names import INPUT_IDS, LOGITS, cache_part, is_present

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Layout = Literal["packed", "padded", "last", "cache", "step"]


@dataclass(frozen=True)
class Point:
    """The name of a value in `points.walk_points`, and the layout of its positions.

    "packed": [B, S, ...], each row's valid positions first; "padded": [B, S, ...], positions where
    the caller put them; "last": [B, 1, ...], the last valid position only; "cache": [B, kv_heads,
    T, head_dim]; "step": no positions, a value that depends on the step (see `Feed`).
    """

    name: str
    layout: Layout


@dataclass(frozen=True)
class Feed:
    """One row of a step's batch: `count` positions of a passage from position `begin` on, after
    `padding` positions of padding."""

    passage: int
    batch: int
    begin: int
    count: int
    padding: int


def feeds_of(step: Step) -> list[Feed]:
    """Return the rows of `step`, whether all of their logits are observed or not."""
    length = step.ids.shape[1]
    found = []
    for row in step.rows:
        new = step.mask[row.batch, -length:]
        padding = int(new.argmax())
        begin = row.first - (row.outputs.indices(length)[0] - padding)
        found.append(Feed(row.passage, row.batch, begin, int(new.sum()), padding))
    return found


# Scope and operator of a node -> the points of its outputs.
_BY_OPERATOR: dict[tuple[str, str], tuple[str, ...]] = {
    ("input_layernorm", "RMSNormalization"): ("input_layernorm",),
    ("input_layernorm", "SimplifiedLayerNormalization"): ("input_layernorm",),
    ("post_attention_layernorm", "RMSNormalization"): ("post_attention_layernorm",),
    ("post_attention_layernorm", "SimplifiedLayerNormalization"): ("post_attention_layernorm",),
    ("norm", "RMSNormalization"): ("norm",),
    ("norm", "SimplifiedLayerNormalization"): ("norm",),
    ("self_attn", "Attention"): (pt.ATTENTION,),
    ("input_layernorm", "SkipSimplifiedLayerNormalization"): (
        "input_layernorm", "", "", pt.INPUT
    ),
    ("post_attention_layernorm", "SkipSimplifiedLayerNormalization"): (
        "post_attention_layernorm", "", "", pt.RESIDUAL
    ),
    ("self_attn", "GroupQueryAttention"): (pt.ATTENTION, pt.KEY, pt.VALUE),
    ("mlp", "Split"): ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp", "QuickGelu"): (pt.ACTIVATION,),
    ("mlp", "Mul"): (pt.PRODUCT,),
    ("norm", "SkipSimplifiedLayerNormalization"): ("norm", "", "", pt.INPUT),
}  # fmt: skip

# Modules whose result is the value that other modules read.
_LINEAR = re.compile(r"embed_tokens|(self_attn|mlp)\.\w+_proj")


def known_values(model: ir.Model) -> dict[str, Point]:
    """Return the values of `model` that have a point, by name."""
    found: dict[str, Point] = {}
    layout = _logits_layout(model)
    for node in model.graph:
        for value, point in zip(node.outputs, _points_of(node, layout), strict=False):
            if point.name:
                found[str(value.name)] = point
        for value, point in _read_by(node):
            found.setdefault(str(value.name), point)
    for value in model.graph.outputs:
        if is_present(name := str(value.name)):
            found[name] = Point(f"self_attn.{cache_part(name)}", "cache")
    if not moves_padding(model):
        found = _with_padding(found)
    found[LOGITS] = Point("logits", layout)
    return found


def _with_padding(found: dict[str, Point]) -> dict[str, Point]:
    """Return the points of a graph that does not move padding: it is in the cache, too."""
    return {
        name: replace(point, layout="padded")
        for name, point in found.items()
        if point.layout in ("packed", "padded")
    }


def scope_of(node: ir.Node) -> str:
    """Return the module a node belongs to: "model/layers.3/self_attn/qkv_proj", or ""."""
    return graph_names.scope_of(node.name or "")


def layer_of(node: ir.Node) -> str:
    """Return "layer 3", or "" for a node outside the layers."""
    layer = graph_names.layer_of(node.name or "")
    return "" if layer is None else f"layer {layer}"


def module_of(node: ir.Node) -> str:
    """Return the module's name in its layer as in PyTorch: "self_attn.qkv_proj"."""
    return graph_names.module_in_layer(node.name or "")


def _points_of(node: ir.Node, logits: Layout) -> Iterator[Point]:
    scope = module_of(node)
    if node.op_type == "Mul" and any(_is_sigmoid(value) for value in node.inputs):
        yield Point(pt.ACTIVATION, "packed")
    elif names := _BY_OPERATOR.get((scope, node.op_type)):
        for name in names:
            yield Point(name, "cache" if name in (pt.KEY, pt.VALUE) else "packed")
    elif _LINEAR.fullmatch(scope):
        for value in node.outputs:
            leaves = any(module_of(user) != scope for user, _ in value.uses())
            yield Point(scope if leaves else "", "packed")
    elif node.op_type == "GatherND":
        yield Point("norm", logits)
    elif node.op_type == "ArgMax":  # once, before the layers, where padding is computed
        yield Point("padding", "step")
    elif _arranges(node):
        yield Point("ids", "step")


def _is_sigmoid(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Sigmoid"


def _arranges(node: ir.Node) -> bool:
    """Whether `node` puts the token ids in the order that attention needs."""
    data = node.inputs[0] if node.op_type == "GatherElements" else None
    return data is not None and data.name == INPUT_IDS


def _read_by(node: ir.Node) -> Iterator[tuple[ir.Value, Point]]:
    """Yield the values that are identified by the node and the input that read them."""
    names: dict[int, str] = {}
    if node.op_type == "GroupQueryAttention":
        names = {5: "seqlens_k", 6: "total_sequence_length"}
    elif _arranges(node):
        names = {1: "packing indices"}
    elif node.op_type == "GatherND":
        names = {1: "unpacking indices"}
    for index, name in names.items():
        value = node.inputs[index]
        if value is not None:
            yield value, Point(name, "step")


def _logits_layout(model: ir.Model) -> Layout:
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    return "last" if logits.shape is not None and logits.shape[1] == 1 else "padded"


def expected(point: Point, shape: Sequence[int], step: Step, passages: Sequence[Points]) -> Floats:
    """Return the expected value, of `shape`, of `point` in `step`; NaN where it may be anything
    (padding). `passages` has the points of each passage."""
    out = np.full(shape, np.nan)
    for feed in feeds_of(step):
        _EXPECTED[point.layout](out, point.name, feed, step, passages[feed.passage])
    return out


def _packed(out: Floats, name: str, feed: Feed, step: Step, points: Points) -> None:
    out[feed.batch, : feed.count] = points[name][feed.begin : feed.begin + feed.count]


def _padded(out: Floats, name: str, feed: Feed, step: Step, points: Points) -> None:
    rows = slice(feed.padding, feed.padding + feed.count)
    out[feed.batch, rows] = points[name][feed.begin : feed.begin + feed.count]


def _last(out: Floats, name: str, feed: Feed, step: Step, points: Points) -> None:
    out[feed.batch, 0] = points[name][feed.begin + feed.count - 1]


def _cache(out: Floats, name: str, feed: Feed, step: Step, points: Points) -> None:
    end = feed.begin + feed.count
    out[feed.batch, :, :end] = points[name][:end].transpose(1, 0, 2)


def _step(out: Floats, name: str, feed: Feed, step: Step, points: Points) -> None:
    """Padding as `graph.model.Window` defines it, computed independently."""
    b, count, padding = feed.batch, feed.count, feed.padding
    if name == "padding":
        out[b] = padding
    elif name == "seqlens_k":
        out[b] = feed.begin + count - 1
    elif name == "total_sequence_length":
        out[...] = step.mask.shape[1]
    elif name == "ids":
        out[b, :count] = step.ids[b, padding : padding + count]
    elif name == "packing indices":
        out[b, :count] = padding + np.arange(count)
    elif out.shape[1] == 1:  # unpacking indices, of a graph with logits of the last position only
        out[b] = count - 1
    else:
        out[b, padding : padding + count] = np.arange(count)[:, None]


_EXPECTED = {"packed": _packed, "padded": _padded, "last": _last, "cache": _cache, "step": _step}
