"""Rotary position tables (Su et al., 2021), scaled for a longer context if the model requires it.

Every formula, including what is rounded to float32 and when, follows transformers'
`ROPE_INIT_FUNCTIONS` (modeling_rope_utils.py, 5.23), with which such models are evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.rope import RopeScaling

Table = npt.NDArray[np.float32]

_ROUNDED_HEADS, _ROUNDED_THETAS = (16, 32, 64, 128), (1e4, 5e5)
"""Head sizes and thetas (Llama's own) at which torch's powers are rounded correctly."""


def rotary_tables(config: LlamaConfig) -> tuple[Table, Table]:
    """Return cos and sin of position * frequency, float32 [max_position_embeddings, head_dim/2].

    Angles are rounded to float32 as in the PyTorch model. At position 4000 more exact angles would
    noticeably differ from those the model was trained with.
    """
    positions, frequencies = rotary_factors(config)
    angles = positions * frequencies  # float32
    scale = np.float32(attention_scale(config.rope_scaling))
    return np.cos(angles, dtype=np.float32) * scale, np.sin(angles, dtype=np.float32) * scale


def rotary_factors(config: LlamaConfig) -> tuple[Table, Table]:
    """Return positions [max_position_embeddings, 1] and frequencies [1, head_dim/2], float32; their
    products are the angles."""
    frequencies = _FREQUENCIES[config.rope_scaling.rope_type if config.rope_scaling else "default"]
    positions = np.arange(config.max_position_embeddings, dtype=np.float32)
    return positions[:, None], frequencies(config)[None]


def attention_scale(scaling: RopeScaling | None) -> float:
    """Return the factor of cos and sin: YaRN's attention temperature (Peng et al., 2023, eq. 22:
    0.1 ln(factor) + 1), 1 for all other types."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(scaling.factor, scaling.mscale) / _mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return _mscale(scaling.factor)


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _powers(config: LlamaConfig, theta: float) -> Table:
    """Return theta^(2i / head_dim), the inverse of the unscaled frequencies, [head_dim/2].

    torch's power is not always rounded correctly, and at position 256 one unit in the last place
    is visible in the tables. Where exact rounding gives torch's values, torch is not loaded.
    """
    if config.head_dim in _ROUNDED_HEADS and theta in _ROUNDED_THETAS:
        exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        exact: Table = (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)
        return exact
    import torch

    fractions = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    powers: Table = (theta**fractions).numpy()
    return powers


def _plain(config: LlamaConfig) -> Table:
    return np.float32(1.0) / _powers(config, config.rope_theta)


def _linear(config: LlamaConfig) -> Table:
    """Position interpolation (Chen et al., 2023, arXiv:2306.15595; kaiokendev)."""
    return _plain(config) / np.float32(_scaling(config).factor)


def _dynamic(config: LlamaConfig) -> Table:
    """Dynamic NTK (bloc97, emozilla): theta grows with the length L of the text, by
    (factor * L / max - (factor - 1))^(d / (d-2)) where L > max = max_position_embeddings.

    A package supports at most max_position_embeddings positions. With L = max the growth is 1;
    transformers also uses the unscaled frequencies for every text that fits.
    """
    factor, dim = _scaling(config).factor, config.head_dim
    growth = factor * config.max_position_embeddings / config.max_position_embeddings - (factor - 1)
    theta = config.rope_theta * growth ** (dim / (dim - 2))
    return np.float32(1.0) / _powers(config, theta)


def _llama3(config: LlamaConfig) -> Table:
    """Llama 3.1 (`apply_scaling` in meta-llama/llama-models): long wavelengths are multiplied by
    the factor, short ones are unchanged, and those in between are interpolated."""
    scaling, plain = _scaling(config), _plain(config)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    assert low is not None and high is not None and original is not None, "required by ROPE_TYPES"
    factor, wavelength = np.float32(scaling.factor), np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    stretched = np.where(wavelength > np.float32(original / low), plain / factor, between)
    return np.where(wavelength < np.float32(original / high), plain, stretched)


def _yarn(config: LlamaConfig) -> Table:
    """YaRN (Peng et al., 2023, arXiv:2309.00071, "NTK-by-parts"): dimensions with many rotations in
    the original context keep their frequency, those with few are interpolated."""
    scaling, powers, dim = _scaling(config), _powers(config, config.rope_theta), config.head_dim
    original = scaling.original_max_position_embeddings
    assert original is not None, "set when the config is read"

    def dimension(rotations: float) -> float:
        """Return the dimension whose frequency makes `rotations` turns in the original context."""
        return (
            dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low, high = dimension(scaling.beta_fast or 32), dimension(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # avoids a division by zero
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width)
    kept = 1 - np.clip(ramp, 0, 1)
    interpolated = np.float32(1.0) / (np.float32(scaling.factor) * powers)
    frequencies: Table = interpolated * (1 - kept) + np.float32(1.0) / powers * kept
    return frequencies


def _scaling(config: LlamaConfig) -> RopeScaling:
    assert config.rope_scaling is not None, "the function was chosen by its type"
    return config.rope_scaling


_FREQUENCIES: dict[str, Callable[[LlamaConfig], Table]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
