"""Graphs with nodes that work on weights alone: as the exporter writes them, and otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from llama_onnx.targets.graph_file import LARGEST_TABLE
from tests.support.hostile_packages import SOUND

FLOAT, BF16, HALF, INT8, BYTE = (
    TensorProto.FLOAT,
    TensorProto.BFLOAT16,
    TensorProto.FLOAT16,
    TensorProto.INT8,
    TensorProto.UINT8,
)

Tensor = tuple[str, int, Sequence[int]]
"""Name, type and shape."""

Node = tuple[str, str, str]
"""Operator, what it reads and what it makes, separated by spaces."""

_SCALES: tuple[Tensor, ...] = (("u", BYTE, (6, 2)), ("r", BF16, (6, 1)))
_PRODUCT: tuple[Node, ...] = (("Cast", "u", "a"), ("Cast", "r", "b"), ("Mul", "a b", "s"))
_ANGLES: tuple[Tensor, ...] = (("p", FLOAT, (9, 1)), ("f", FLOAT, (1, 4)), ("k", FLOAT, ()))
_WAVES: tuple[Node, ...] = (("Mul", "p f", "a"), ("Cos", "a", "c"), ("Sin", "a", "s"))
_CONVERTED = "computes with weights alone"
_AGAIN = "converts the same weights again and again"
_STEPS = "converts weights in many steps"


def _row_of_casts(count: int) -> list[Node]:
    return [("Cast", f"c{i}" if i else "u", f"c{i + 1}") for i in range(count)]


_Parts = tuple[Iterable[Tensor], Iterable[Node]]

SOUND_FOLDS: Mapping[str, _Parts] = {
    "scales": (_SCALES, _PRODUCT),
    "scales of a tied head too": (
        _SCALES,
        (*_PRODUCT, ("Cast", "u", "c"), ("Cast", "r", "d"), ("Mul", "c d", "t")),
    ),
    "half-precision scales": ((("h", HALF, (6, 2)),), (("Cast", "h", "s"),)),
    "rotary tables": (_ANGLES, _WAVES),
    "scaled rotary tables": (_ANGLES, (*_WAVES, ("Mul", "c k", "d"), ("Mul", "s k", "t"))),
    "the largest table": (
        (("p", FLOAT, (LARGEST_TABLE >> 12, 1)), ("f", FLOAT, (1, 1 << 12))),
        _WAVES,
    ),
    "a product of what is not constant": (
        _SCALES,
        (("Cast", "input_ids", "x"), ("Mul", "x u", "y"), ("Cos", "y", "z")),
    ),
    "as many conversions in a row as may be": (_SCALES, _row_of_casts(5)),
}

HOSTILE_FOLDS: Mapping[str, tuple[str, _Parts]] = {
    "a product of a column and a row": (
        _CONVERTED,
        ((("u", BYTE, (6, 1)), ("r", BF16, (1, 6))), _PRODUCT),
    ),
    "factors for other rows": (_CONVERTED, ((("u", BYTE, (1, 2)), ("r", BF16, (6, 1))), _PRODUCT)),
    "scales of three dimensions": (
        _CONVERTED,
        ((("u", BYTE, (6, 1, 1)), ("r", BF16, (6, 1))), _PRODUCT),
    ),
    "factors of three dimensions": (
        _CONVERTED,
        ((("u", BYTE, (6, 2)), ("r", BF16, (6, 1, 1))), _PRODUCT),
    ),
    "factors in half precision": (
        _CONVERTED,
        ((("u", BYTE, (6, 2)), ("r", HALF, (6, 1))), _PRODUCT),
    ),
    "signed scales": (_CONVERTED, ((("u", INT8, (6, 2)), ("r", BF16, (6, 1))), _PRODUCT)),
    "scales that are no Cast": (
        _CONVERTED,
        (_SCALES, (("Transpose", "u", "a"), ("Cast", "r", "b"), ("Mul", "a b", "s"))),
    ),
    "the product of a product": (_CONVERTED, (_SCALES, (*_PRODUCT, ("Mul", "s b", "t")))),
    "a product of one": (_CONVERTED, (_SCALES, (("Cast", "u", "a"), ("Mul", "a", "s")))),
    "a product of three": (_CONVERTED, (_SCALES, (*_PRODUCT[:2], ("Mul", "a b b", "s")))),
    "a sum of scales": (_CONVERTED, (_SCALES, (*_PRODUCT, ("Add", "s s", "t")))),
    "a constant times what is not": (
        _CONVERTED,
        (_SCALES, (("Cast", "input_ids", "x"), ("Mul", "u x", "y"))),
    ),
    "cosines of scales": (_CONVERTED, (_SCALES, (*_PRODUCT, ("Cos", "s", "t")))),
    "cosines of weights": (_CONVERTED, (_ANGLES, (("Cos", "p", "c"),))),
    "cosines of cosines": (_CONVERTED, (_ANGLES, (*_WAVES, ("Cos", "c", "d")))),
    "tables multiplied": (_CONVERTED, (_ANGLES, (*_WAVES, ("Mul", "c s", "d")))),
    "tables times a row": (_CONVERTED, (_ANGLES, (*_WAVES, ("Mul", "c f", "d")))),
    "a table of bytes": (
        _CONVERTED,
        ((("p", BYTE, (9, 1)), ("f", BYTE, (1, 4))), _WAVES),
    ),
    "a table from a row and a column": (_CONVERTED, (_ANGLES, (("Mul", "f p", "a"),))),
    "a table that is too large": (
        _CONVERTED,
        ((("p", FLOAT, ((LARGEST_TABLE >> 12) + 1, 1)), ("f", FLOAT, (1, 1 << 12))), _WAVES),
    ),
    "two tables": (_AGAIN, (_ANGLES, (*_WAVES, ("Mul", "p f", "b")))),
    "two tables of other positions": (
        _AGAIN,
        ((*_ANGLES, ("q", FLOAT, (9, 1))), (*_WAVES, ("Mul", "q f", "b"))),
    ),
    "three conversions of the same weights": (
        _AGAIN,
        (_SCALES, [("Cast", "u", f"x{i}") for i in range(3)]),
    ),
    "three conversions of what was converted": (
        _AGAIN,
        (_SCALES, [("Cast", "u", "a"), *(("Transpose", "a", f"x{i}") for i in range(3))]),
    ),
    "conversions in a row": (_STEPS, (_SCALES, _row_of_casts(6))),
}
"""What is wrong, by name, and how to make it."""


def folded_graph(tensors: Iterable[Tensor], nodes: Iterable[Node]) -> tuple[bytes, int]:
    """Return a sound graph with `tensors` and `nodes` added, and the size of its data."""
    model = onnx.load(SOUND / "model.onnx", load_external_data=False)
    for name, kind, shape in tensors:
        model.graph.initializer.append(_tensor(name, kind, shape))
    for operator, inputs, outputs in nodes:
        node = helper.make_node(operator, inputs.split(), outputs.split())
        if operator == "Cast":
            node.attribute.append(helper.make_attribute("to", FLOAT))
        model.graph.node.append(node)
    return model.SerializeToString(), (SOUND / "model.onnx.data").stat().st_size


def _tensor(name: str, kind: int, shape: Sequence[int]) -> onnx.TensorProto:
    dtype: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(kind)
    raw = bytes(dtype.itemsize * int(np.prod(shape)))
    return helper.make_tensor(name, kind, shape, raw, raw=True)
