"""The matrices of a decoder layer that share their inputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Modules of a layer that read the same values; `scaled` is the module whose outputs these are,
    up to steps that a factor passes through."""

    members: tuple[str, ...]
    scaled: str


GROUPS = (
    Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Group(("self_attn.o_proj",), "self_attn.v_proj"),
    Group(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Group(("mlp.down_proj",), "mlp.up_proj"),
)
"""In the order in which a layer computes them."""
