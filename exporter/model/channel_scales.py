"""Channel scales: factors that move between neighboring matrices and leave the model's function.

A channel between two matrices can be divided by s in the first and multiplied by s in the second.
AWQ (Lin et al., 2023, arXiv:2306.00978) chooses such factors so that channels with large inputs
lose less when the second matrix is quantized. In a Llama there are five places:

    input_layernorm            gain / s    ->  columns of q_proj, k_proj, v_proj * s
    self_attn.v_proj           rows / s    ->  columns of o_proj * s, the same for all query heads
                                               of one key-value head
    post_attention_layernorm   gain / s    ->  columns of gate_proj and up_proj * s
    mlp.up_proj                rows / s    ->  columns of down_proj * s
    model.norm                 gain / s    ->  columns of lm_head * s, unless it is tied

Scales are powers 2^(exponent / 8), so that one byte describes a channel exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.config import LlamaConfig

Exponents = npt.NDArray[np.int8]

STEPS_PER_OCTAVE = 8
"""A scale is 2^(exponent / 8): neighboring scales differ by 9 %, far less than matters."""

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
"""Module of a layer whose outputs are divided -> modules whose columns are multiplied."""

_FINAL_NORM, _HEAD = "model.norm", "lm_head"


@dataclass(frozen=True)
class ChannelScales:
    """Exponents int8 [channels] by the module whose outputs are divided by the scales, such as
    "model.layers.0.self_attn.v_proj"; a module that is not named keeps its channels."""

    exponents: Mapping[str, Exponents]

    def outputs(self, module: str) -> Float32 | None:
        """Return what the rows of `module` (or the gains of a norm) are divided by, [rows]."""
        found = self.exponents.get(module)
        return None if found is None else scales_of(found)

    def inputs(self, module: str, config: LlamaConfig) -> Float32 | None:
        """Return what the columns of `module` are multiplied by, [columns]."""
        source = _source_of(module)
        found = self.exponents.get(source) if source else None
        if found is None:
            return None
        if module.endswith("self_attn.o_proj"):
            found = _for_each_query_head(found, config)
        return scales_of(found)


def scales_of(exponents: Exponents) -> Float32:
    """Return the scales of `exponents`, float32.

    >>> scales_of(np.array([-8, 0, 16], np.int8)).tolist()
    [0.5, 1.0, 4.0]
    """
    return np.exp2(exponents.astype(np.float64) / STEPS_PER_OCTAVE).astype(np.float32)


def exponents_of(scales: Float32) -> Exponents:
    """Return the exponents of the powers nearest to `scales`, which are positive."""
    with np.errstate(divide="ignore"):
        steps = np.rint(STEPS_PER_OCTAVE * np.log2(scales.astype(np.float64)))
    found: Exponents = np.clip(np.nan_to_num(steps), -127, 127).astype(np.int8)
    return found


def scaled_modules(config: LlamaConfig) -> Mapping[str, int]:
    """Return the modules whose outputs can be divided, each with its number of channels."""
    sizes = {
        "input_layernorm": config.hidden_size,
        "self_attn.v_proj": config.kv_size,
        "post_attention_layernorm": config.hidden_size,
        "mlp.up_proj": config.intermediate_size,
    }
    found = {
        f"model.layers.{layer}.{module}": size
        for layer in range(config.num_hidden_layers)
        for module, size in sizes.items()
    }
    if not config.tie_word_embeddings:
        found[_FINAL_NORM] = config.hidden_size
    return found


def _source_of(module: str) -> str | None:
    """Return the module whose scaled outputs `module` reads."""
    if module == _HEAD:
        return _FINAL_NORM
    for source, readers in _READERS.items():
        for reader in readers:
            if module.endswith(f".{reader}"):
                return module.removesuffix(reader) + source
    return None


def _for_each_query_head(exponents: Exponents, config: LlamaConfig) -> Exponents:
    """Return exponents [num_attention_heads head_dim] for those of the values [kv_size]."""
    heads = exponents.reshape(config.num_key_value_heads, 1, config.head_dim)
    group = config.num_attention_heads // config.num_key_value_heads
    found: Exponents = np.repeat(heads, group, axis=1).reshape(-1)
    return found
