"""What a provider's kernel needs beyond types: a graph can meet the table, open, and be wrong.

Each function returns why the kernel does not compute a node rightly; None if it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

ZERO_POINTS = 3
"""The input of MatMulNBits."""


def matmul_on_directml(node: ir.Node) -> str | None:
    """Seen with onnxruntime-directml 1.24.4, against the CPU (`nox -s directml`)."""
    columns, block, bits = (_number(node, name) for name in ("K", "block_size", "bits"))
    if columns % block:
        return f"{columns} columns are not whole blocks of {block}: choose a smaller --block-size"
    if bits == 8 and _given(node, ZERO_POINTS) and columns // block % 2:
        return "zero points of 8 bits are read wrongly where a row has an odd number of blocks"
    return None


CONDITIONS: Mapping[tuple[str, str], Callable[[ir.Node], str | None]] = {
    ("directml", "MatMulNBits"): matmul_on_directml,
}
"""Provider and operator -> what else its kernel needs."""


def _number(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].as_int())


def _given(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None
