"""Runs a decoder layer on the calibration's tokens and collects what its matrices read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama_onnx.exporter.calibration.groups import GROUPS, Group
from llama_onnx.exporter.calibration.states import not_finite
from llama_onnx.exporter.formats.tensor import Float32
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.quantize.inputs import Collector, Inputs
from llama_onnx.exporter.reference.hooks import attached
from llama_onnx.exporter.reference.walk import advance, window_mask


def collect_layer(
    layer: LlamaDecoderLayer,
    index: int,
    hidden: list[Tensor],
    rotary: LlamaRotaryEmbedding,
    config: LlamaConfig,
    *,
    correlates: bool,
    weights: Mapping[str, Float32] | None = None,
) -> Mapping[str, Inputs]:
    """Replace the `hidden` states [1, S, H] before `layer` with those after it, and return the
    inputs of each member of a group.

    With `weights` of the tokens [T] for each member, each has inputs of its own; without, those
    of one group are one object.

    Raises `CheckpointError` for values that are NaN or infinite.
    """
    collectors = {
        member: Collector(
            _channels(layer, group),
            correlates=correlates,
            weights=weights[member] if weights else None,
        )
        for group in GROUPS
        for member in (group.members if weights else group.members[:1])
    }
    hooks = (
        layer.get_submodule(member).register_forward_pre_hook(_adding_to(collector))
        for member, collector in collectors.items()
    )
    with torch.inference_mode(), attached(hooks):
        for number, x in enumerate(hidden):  # replaced one by one: both need not be in memory
            hidden[number] = advance(layer, rotary, x, window_mask(config, x.shape[1]))
    for member, collector in collectors.items():
        if not collector.finite:
            raise not_finite(
                f"layer {index}: {member} reads NaN or infinity from the calibration's text"
            )
    inputs = {member: collector.inputs() for member, collector in collectors.items()}
    return {
        member: inputs.get(member) or inputs[group.members[0]]
        for group in GROUPS
        for member in group.members
    }


def _channels(layer: nn.Module, group: Group) -> int:
    weight = layer.get_submodule(group.members[0]).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


def _adding_to(collector: Collector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        collector.add(arguments[0].reshape(-1, arguments[0].shape[-1]).numpy())

    return hook
