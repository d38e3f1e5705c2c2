"""Are the package's rotary tables transformers' own? At every position, whatever the prompts.

Logits cannot say: where both tables are shifted alike nothing changes but the cached keys, and what
is wrong behind the last position that was tried is not seen at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.config import LlamaConfig

Array = npt.NDArray[Any]

_ROWS = 4096
_COS, _SIN = 7, 8  # inputs of GroupQueryAttention


@dataclass(frozen=True)
class RotaryError:
    """Largest difference of a table's value from transformers', and of the first `table` ("cos" or
    "sin") that has any above the limit asked for, its `initializer` and the positions where."""

    max_abs: float
    table: str
    initializer: str
    positions: tuple[int, ...]


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of `model` that rotate queries and keys by tables."""
    return [
        node
        for node in model.graph
        if node.op_type == "GroupQueryAttention" and len(node.inputs) > _SIN and node.inputs[_COS]
    ]


def rotary_error(model: ir.Model, config: LlamaConfig, limit: float = 0) -> RotaryError | None:
    """Compare the tables that the attention reads; None if there are none. A few MB at a time."""
    tables = {node.inputs[i]: i for node in attention_nodes(model) for i in (_COS, _SIN)}
    found = [_table_error(value, index, config, limit) for value, index in tables.items()]
    if not found:
        return None
    worst = max(error.max_abs if error.max_abs == error.max_abs else np.inf for error in found)
    first = next((error for error in found if error.positions), found[0])
    return replace(first, max_abs=worst)


def _table_error(
    value: ir.Value | None, index: int, config: LlamaConfig, limit: float
) -> RotaryError:
    assert value is not None and value.const_value is not None, "tables are initializers"
    name = "cos" if index == _COS else "sin"
    table = value.const_value.numpy()
    errors = [
        np.abs(table[positions] - _reference(config, positions)[name]).max(axis=1)
        for positions in (
            np.arange(start, min(start + _ROWS, len(table)))
            for start in range(0, len(table), _ROWS)
        )
    ]
    error = np.concatenate(errors)  # [positions]
    wrong = np.flatnonzero(~(error <= limit))
    return RotaryError(float(error.max()), name, str(value.name), tuple(wrong.tolist()))


def rotated(keys: Array, position: int, config: LlamaConfig) -> Array:
    """`keys` [heads, head_dim] at `position`, rotated as transformers does."""
    table = _reference(config, np.array([position]))
    cos, sin = (np.concatenate([table[n][0]] * 2) for n in ("cos", "sin"))  # [head_dim]
    first, second = np.split(keys, 2, axis=-1)
    return np.asarray(keys * cos + np.concatenate([-second, first], axis=-1) * sin)


def _reference(config: LlamaConfig, positions: npt.NDArray[np.int64]) -> dict[str, Array]:
    """cos and sin [n, head_dim/2] of `LlamaRotaryEmbedding`."""
    import torch

    from llama_onnx.exporter.walk import rotary_embedding

    with torch.inference_mode():
        cos, sin = rotary_embedding(config)(torch.zeros(1), torch.from_numpy(positions)[None])
    half = config.head_dim // 2  # its tables hold every frequency twice
    return {"cos": cos[0, :, :half].numpy(), "sin": sin[0, :, :half].numpy()}
