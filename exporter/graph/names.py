"""Names of modules, nodes and initializers in the graph, built and parsed only here.

A module has its Hugging Face name: `model.layers.3.self_attn.q_proj`. Its nodes have its path as a
prefix: `model/layers.3/self_attn/q_proj/MatMulNBits`. Its initializers have the storage's part as a
suffix: `model.layers.3.self_attn.q_proj.qweight`. For inputs and outputs see
targets/graph_names.py.
"""

from __future__ import annotations

import re

from llama_onnx.exporter.model.storage import QWEIGHT, WEIGHT

MODEL, HEAD = "model", "lm_head"
EMBEDDING, NORM = f"{MODEL}.embed_tokens", f"{MODEL}.norm"
COS_CACHE, SIN_CACHE = f"{MODEL}.cos_cache", f"{MODEL}.sin_cache"
POSITIONS, FREQUENCIES = f"{MODEL}.positions", f"{MODEL}.frequencies"

_LAYER = re.compile(rf"{MODEL}/layers\.(\d+)/")
_PREFIX = re.compile(rf"^{MODEL}(/layers\.\d+)?/?")


def layer_module(layer: int) -> str:
    """Return the name of a decoder layer.

    >>> layer_module(3)
    'model.layers.3'
    """
    return f"{MODEL}.layers.{layer}"


def initializer_name(module: str, part: str) -> str:
    """Return the name of the initializer for `part` of the matrix of `module`.

    >>> initializer_name(HEAD, QWEIGHT)
    'lm_head.qweight'
    """
    return f"{module}.{part}"


def belongs_to(module: str, initializer: str) -> bool:
    """Return whether `initializer` belongs to `module` or to a module in it."""
    return initializer.startswith(f"{module}.")


def matrix_names(module: str) -> tuple[str, str]:
    """Return the names of the initializers of `module`'s matrix: for floats, and for codes."""
    return initializer_name(module, WEIGHT), initializer_name(module, QWEIGHT)


def scope_of(node: str) -> str:
    """Return the path of the module of the node named `node`; "" if it has none.

    >>> scope_of("model/layers.3/self_attn/qkv_proj/MatMulNBits")
    'model/layers.3/self_attn/qkv_proj'
    """
    return node.rpartition("/")[0]


def layer_of(node: str) -> int | None:
    """Return the index of the decoder layer of the node named `node`; None if it is in no layer.

    >>> layer_of("model/layers.3/self_attn/qkv_proj/MatMulNBits")
    3
    """
    match = _LAYER.match(node)
    return int(match[1]) if match else None


def module_in_layer(node: str) -> str:
    """Return the module of the node named `node`, without the prefix of its layer.

    >>> module_in_layer("model/layers.3/self_attn/qkv_proj/MatMulNBits")
    'self_attn.qkv_proj'
    >>> module_in_layer("model/norm/RMSNormalization")
    'norm'
    """
    return _PREFIX.sub("", scope_of(node)).replace("/", ".")
