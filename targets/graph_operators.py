"""The operators that a package's graph may have: those that our exporter writes, and no others."""

from __future__ import annotations

from collections.abc import Mapping

OPERATORS: Mapping[str, frozenset[str]] = {
    "": frozenset(
        [
            "Add",
            "And",
            "ArgMax",
            "Attention",
            "Cast",
            "Concat",
            "Cos",
            "CumSum",
            "DequantizeLinear",
            "Equal",
            "Gather",
            "GatherElements",
            "GatherND",
            "GreaterOrEqual",
            "LessOrEqual",
            "MatMul",
            "Max",
            "Mod",
            "Mul",
            "Neg",
            "Or",
            "RMSNormalization",
            "Range",
            "ReduceMax",
            "ReduceSum",
            "RotaryEmbedding",
            "Shape",
            "Sigmoid",
            "SimplifiedLayerNormalization",
            "Sin",
            "Slice",
            "Split",
            "Squeeze",
            "Sub",
            "Transpose",
            "Unsqueeze",
        ]
    ),
    "com.microsoft": frozenset(
        [
            "FusedMatMul",
            "GatherBlockQuantized",
            "GroupQueryAttention",
            "MatMulNBits",
            "QuickGelu",
            "RotaryEmbedding",
            "SkipSimplifiedLayerNormalization",
        ]
    ),
}
"""Domain -> operators that the exporter writes, of all targets and versions.

Before you add one: none may hold a graph (If, Loop, Scan), run code or read a file (PyOp,
EPContext), or give a tensor larger than its inputs (Expand, Tile, ConstantOfShape), unless
`_check_sizes` bounds it, as it does Range.
"""
