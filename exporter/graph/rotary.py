"""Rotary position tables (Su et al., 2021)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.config import LlamaConfig

Table = npt.NDArray[np.float32]


def rotary_tables(config: LlamaConfig) -> tuple[Table, Table]:
    """cos and sin of position * theta^(-2i / head_dim), each [max_position_embeddings, head_dim/2].

    Angles are rounded to float32 as PyTorch's own model rounds them: at position 4000 a more exact
    angle would be a different model from the one that was trained.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float64(config.rope_theta) ** exponents.astype(np.float64)
    inv_freq = np.float32(1.0) / powers.astype(np.float32)
    positions = np.arange(config.max_position_embeddings, dtype=np.float32)
    angles = np.outer(positions, inv_freq)  # float32
    return np.cos(angles, dtype=np.float32), np.sin(angles, dtype=np.float32)
