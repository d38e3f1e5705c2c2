"""Rope scaling in a GGUF file, in the form of transformers' config.json.

llama.cpp stores `linear` and `yarn` as metadata, but `llama3` as a tensor: `rope_freqs.weight` has
the divisor of each frequency, from which the parameters have to be recovered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.gguf import Header
from llama_onnx.exporter.formats.tensor import read_values
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import shown

FREQUENCIES = "rope_freqs.weight"

_PREFIX = "llama.rope.scaling."
_YARN = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_NEUTRAL = {"yarn_ext_factor": (1, -1), "yarn_attn_factor": (1,), "yarn_log_multiplier": (0,)}
"""Keys without a counterpart in transformers -> values with which both compute the same."""

_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The parameters of all Llama 3.1 and 3.2 models; only `factor` differs."""


def rope_block(path: Path, header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the rope_parameters of the file `path`; `{"rope_type": "default"}` without scaling.

    Raises `UnsupportedError` for a scaling that transformers cannot express, `CheckpointError` if
    the tensor of divisors is damaged.
    """
    metadata, where = header.metadata, str(path)
    older = metadata.get("llama.rope.scale_linear", 1.0)
    factor = metadata.get(f"{_PREFIX}factor", older)
    # The default is linear: llama.cpp reads older files in the same way.
    kind = metadata.get(f"{_PREFIX}type", "linear")
    if kind in ("linear", "yarn") and factor == 1:
        kind = "none"
    if FREQUENCIES in header.tensors:
        if kind != "none":
            raise UnsupportedError(
                f"{where} has both {FREQUENCIES} and {shown(kind)} rope scaling."
            )
        return _llama3(path, header, theta, head_dim)
    if kind == "none":
        return {"rope_type": "default"}
    block = {"rope_type": kind, "factor": factor}
    return block | (_yarn(metadata, where) if kind == "yarn" else {})


def _yarn(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key, values in _NEUTRAL.items():
        value = metadata.get(_PREFIX + key, values[0])
        if value not in values:
            raise UnsupportedError(f"{where}: {_PREFIX}{key} {shown(value)} is not supported.")
    given = {name: metadata.get(_PREFIX + key) for key, name in _YARN.items()}
    return {name: value for name, value in given.items() if value is not None}


def _llama3(path: Path, header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    info = header.tensors[FREQUENCIES]
    count = head_dim // 2
    if info.type.name != "F32" or info.shape != (count,):
        raise CheckpointError(
            f"{path}: {FREQUENCIES} is {info.type.name} {list(info.shape)}, not F32 [{count}]."
        )
    found = read_values(path, np.dtype("<f4"), count, info.offset, FREQUENCIES)
    if (found == 1).all():
        return {"rope_type": "default"}
    # The lowest frequency is divided by the full factor. As a decimal: 8, not 8.000000001.
    factor = float(str(found[-1]))
    if factor > 1 and np.allclose(found, _divisors(factor, theta, count), rtol=1e-5, atol=0):
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    raise UnsupportedError(
        f"{path}: {FREQUENCIES} does not match Llama 3.1 or 3.2, so its rope scaling cannot be "
        "identified: export the original checkpoint folder instead."
    )


def _divisors(factor: float, theta: float, count: int) -> npt.NDArray[np.float64]:
    """Return the divisors of the frequencies for `llama3`: `factor` for low ones, 1 for high ones,
    interpolated in between."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    frequencies = theta ** -(np.arange(count) / count)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - share) / factor + share)
    return divisors
