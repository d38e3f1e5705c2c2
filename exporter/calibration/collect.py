"""Runs a decoder layer on the calibration's tokens and collects what its matrices read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llama_onnx.exporter.calibration.groups import GROUPS, Group
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.quantize.inputs import Collector, Inputs
from llama_onnx.exporter.reference.walk import advance, window_mask
from llama_onnx.targets.errors import CheckpointError


def collect_layer(
    layer: LlamaDecoderLayer,
    index: int,
    hidden: Sequence[Tensor],
    rotary: LlamaRotaryEmbedding,
    config: LlamaConfig,
    *,
    correlates: bool,
) -> tuple[list[Tensor], Mapping[Group, Inputs]]:
    """Return the hidden states [1, S, H] after `layer`, and the inputs of each group of matrices.

    Raises `CheckpointError` for values that are NaN or infinite.
    """
    collectors = {
        group: Collector(_channels(layer, group), correlates=correlates) for group in GROUPS
    }
    with torch.inference_mode(), _watching(layer, collectors):
        after = [advance(layer, rotary, x, window_mask(config, x.shape[1])) for x in hidden]
    for group, collector in collectors.items():
        if not collector.finite:
            raise CheckpointError(
                f"layer {index}: {group.members[0]} reads NaN or infinity from the calibration's "
                "text: the weights are damaged, or the training diverged."
            )
    return after, {group: collector.inputs() for group, collector in collectors.items()}


def _channels(layer: nn.Module, group: Group) -> int:
    weight = layer.get_submodule(group.members[0]).weight
    assert isinstance(weight, Tensor)
    return weight.shape[1]


@contextmanager
def _watching(layer: nn.Module, collectors: Mapping[Group, Collector]) -> Iterator[None]:
    """Hand the inputs of each group's matrices to its collector."""
    handles = [
        layer.get_submodule(group.members[0]).register_forward_pre_hook(_adding_to(collector))
        for group, collector in collectors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding_to(collector: Collector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        collector.add(arguments[0].reshape(-1, arguments[0].shape[-1]).numpy())

    return hook
