"""Compares the package's rotary tables with those of transformers, at every position.

Logits cannot show every error there: a shift of both tables changes only the cached keys, and an
error after the last position of the prompts changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.reference.constants import value_of

Array = npt.NDArray[Any]

_ROWS = 4096

# Operator and domain -> the input that is the table of cosines; that of sines is the next one.
_COS = {
    ("GroupQueryAttention", "com.microsoft"): 7,
    ("RotaryEmbedding", "com.microsoft"): 2,
    ("RotaryEmbedding", ""): 1,
}


@dataclass(frozen=True)
class RotaryError:
    """`max_abs` is the largest difference of any table from transformers' value.

    `table` ("cos" or "sin") and `initializer` identify the first table with a difference above the
    limit, `positions` are those of its differences.
    """

    max_abs: float
    table: str
    initializer: str
    positions: tuple[int, ...]


def rotating_nodes(model: ir.Model) -> dict[ir.Node, tuple[ir.Value, ir.Value]]:
    """Return the nodes of `model` that rotate queries or keys, with their tables of cos and sin."""
    found = {}
    for node in model.graph:
        index = _COS.get((node.op_type, node.domain))
        if index is not None and len(node.inputs) > index + 1:
            cos, sin = node.inputs[index : index + 2]
            if cos is not None and sin is not None:
                found[node] = (cos, sin)
    return found


def rotary_error(model: ir.Model, config: LlamaConfig, limit: float = 0) -> RotaryError | None:
    """Compare the tables that the attention reads, from the data file or computed, a few MB at a
    time; None if there are none."""
    tables = {
        value: name
        for pair in rotating_nodes(model).values()
        for value, name in zip(pair, ("cos", "sin"), strict=True)
    }
    found = [_table_error(value, name, config, limit) for value, name in tables.items()]
    if not found:
        return None
    worst = max(error.max_abs if error.max_abs == error.max_abs else np.inf for error in found)
    first = next((error for error in found if error.positions), found[0])
    return replace(first, max_abs=worst)


def _table_error(value: ir.Value, name: str, config: LlamaConfig, limit: float) -> RotaryError:
    table = value_of(value)
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


@dataclass(frozen=True)
class Rotation:
    """`inputs` that make a node rotate some keys, the name of its `output`, and the `expected`
    value (NaN where it may be anything)."""

    inputs: dict[str, Array]
    output: str
    expected: Array


def rotation_at(node: ir.Node, position: int, config: LlamaConfig) -> Rotation:
    """Return inputs that make `node`, one of `rotating_nodes`, rotate random keys (or queries) at
    `position`."""
    if node.op_type == "GroupQueryAttention":
        return _attention_at(node, position, config)
    x = node.inputs[0]
    assert x is not None and x.shape is not None and isinstance(x.shape[2], int)
    heads = x.shape[2] // config.head_dim
    keys = np.random.default_rng(0).standard_normal((heads, config.head_dim), np.float32)
    ids = node.inputs[1 if node.domain else 3]
    assert ids is not None
    inputs = {
        str(x.name): keys.reshape(1, 1, -1).astype(_dtype(x)),
        str(ids.name): np.array([[position]]),
    }
    expected = _rotated(keys, position, config).reshape(1, 1, -1)
    return Rotation(inputs, str(node.outputs[0].name), expected)


def _attention_at(node: ir.Node, position: int, config: LlamaConfig) -> Rotation:
    heads, dim = config.num_key_value_heads, config.head_dim
    query = node.inputs[0]
    assert query is not None
    keys = np.random.default_rng(0).standard_normal((heads, dim), np.float32)
    packed = np.zeros((1, 1, config.q_size + 2 * config.kv_size), _dtype(query))
    packed[0, 0, config.q_size : config.q_size + config.kv_size] = keys.ravel()
    past = np.zeros((1, heads, position, dim), packed.dtype)
    last, length = np.array([position], np.int32), np.array(position + 1, np.int32)
    arrays: tuple[Array, ...] = (packed, past, past, last, length)
    fed = dict(zip((0, 3, 4, 5, 6), arrays, strict=True))
    inputs = {str(v.name): fed[i] for i, v in enumerate(node.inputs) if v is not None and i in fed}
    expected = np.full((1, heads, position + 1, dim), np.nan)
    expected[0, :, position] = _rotated(keys, position, config)
    return Rotation(inputs, str(node.outputs[1].name), expected)


def _dtype(value: ir.Value) -> np.dtype[Any]:
    assert value.dtype is not None
    return value.dtype.numpy()


def _rotated(keys: Array, position: int, config: LlamaConfig) -> Array:
    """Return `keys` [heads, head_dim] rotated as transformers rotates them at `position`."""
    table = _reference(config, np.array([position]))
    cos, sin = (np.concatenate([table[n][0]] * 2) for n in ("cos", "sin"))  # [head_dim]
    first, second = np.split(keys, 2, axis=-1)
    return np.asarray(keys * cos + np.concatenate([-second, first], axis=-1) * sin)


def _reference(config: LlamaConfig, positions: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Return cos and sin [n, head_dim/2] of `LlamaRotaryEmbedding`."""
    import torch

    from llama_onnx.exporter.reference.walk import rotary_embedding

    with torch.inference_mode():
        cos, sin = rotary_embedding(config)(torch.zeros(1), torch.from_numpy(positions)[None])
    half = config.head_dim // 2  # those tables hold every frequency twice
    return {"cos": cos[0, :, :half].numpy(), "sin": sin[0, :, :half].numpy()}
