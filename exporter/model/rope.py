"""Parameters that scale rotary frequencies for a longer context, as plain data.

Names and meanings are those of transformers' `rope_parameters`; exporter/graph/rotary.py applies
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """One scaling; parameters that `rope_type` does not use are None.

    `original_max_position_embeddings` is the context the model was trained with before it was
    extended to the config's max_position_embeddings.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def to_huggingface(self) -> dict[str, Any]:
        """Return the block as config.json holds it, without rope_theta."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class RopeKeys:
    """Keys of one rope type besides `factor`: required and optional numbers."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


ROPE_TYPES: Mapping[str, RopeKeys] = {
    "linear": RopeKeys(),
    "dynamic": RopeKeys(),
    "llama3": RopeKeys(required=("low_freq_factor", "high_freq_factor")),
    "yarn": RopeKeys(
        optional=("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    ),
}
"""The scaling types that can be exported."""
