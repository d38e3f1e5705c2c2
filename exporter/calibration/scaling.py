"""The channel scales of a group of matrices, from some of their rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.channel_scales import Exponents
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.storage import Blocks
from llama_onnx.exporter.quantize.awq import channel_exponents


def group_exponents(
    config: LlamaConfig, scaled: str, rows: Float32, squares: Float32, storage: Blocks
) -> Exponents:
    """Return the exponents of the channels between the module `scaled` and matrices of which `rows`
    [R, K] are some rows, with inputs of mean squares `squares` [K].

    Those of the values are shared by the query heads of each key-value head.
    """
    shared, groups = 1, 1
    if scaled.endswith("self_attn.v_proj"):
        groups = config.num_key_value_heads
        shared = config.num_attention_heads // groups
    return channel_exponents(rows, squares, storage, shared, groups)


def spread(rows: int, count: int) -> npt.NDArray[np.int64]:
    """Return the numbers of at most `count` rows, spread evenly over `rows`.

    >>> spread(9, 3).tolist()
    [0, 4, 8]
    """
    return np.unique(np.linspace(0, rows - 1, min(rows, count)).astype(np.int64))
