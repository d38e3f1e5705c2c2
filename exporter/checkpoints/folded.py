"""A checkpoint with channel scales folded into its matrices: other numbers, the same function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from llama_onnx.exporter.formats.safetensors import stored_tensors
from llama_onnx.exporter.formats.tensor import Float32, LazyTensor
from llama_onnx.exporter.model.channel_scales import ChannelScales, scaled_modules
from llama_onnx.exporter.model.checkpoint import Checkpoint, OverBase
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.targets.errors import CheckpointError, PackageError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.package import CHANNEL_SCALES


@dataclass(frozen=True)
class FoldedCheckpoint(OverBase):
    """`base` with `scales` folded into norms and matrices; see `ChannelScales`."""

    base: Checkpoint
    scales: ChannelScales

    @property
    def config(self) -> LlamaConfig:
        """The base's architecture."""
        return self.base.config

    def tensor(self, name: str) -> LazyTensor:
        """Return tensor `name`, folded."""
        tensor, module = self.base.tensor(name), name.removesuffix(".weight")
        outputs = self.scales.outputs(module)
        inputs = self.scales.inputs(module, self.config)
        if outputs is None and inputs is None:
            return tensor

        def rows(start: int, stop: int) -> Float32:
            found = tensor.rows(start, stop)
            if inputs is not None:
                found = found * inputs
            if outputs is not None:
                part = outputs[start:stop]
                found = found / (part if found.ndim == 1 else part[:, None])
            return found

        return replace(tensor, rows=rows, codes=None)


def write_channel_scales(scales: ChannelScales, folder: Path) -> None:
    """Write `scales` to a package in `folder`."""
    tensors = {name: np.ascontiguousarray(found) for name, found in scales.exponents.items()}
    (folder / CHANNEL_SCALES).write_bytes(save(dict(sorted(tensors.items()))))


def folded_like(package: Path, original: Checkpoint) -> Checkpoint:
    """Return `original` with the channel scales of `package`, if it has any, folded.

    Raises `PackageError` for a file of scales that is damaged or belongs to another model.
    """
    file = file_inside(package, CHANNEL_SCALES, PackageError)
    if file is None:
        return original
    known = scaled_modules(original.config)
    exponents = {}
    try:
        for name, stored in stored_tensors(file).items():
            if name not in known or stored.code != "I8" or stored.shape != (known[name],):
                raise PackageError(
                    f"{file}: {name} is {stored.code} {list(stored.shape)}, which is not the scale "
                    "of a channel of this model: export the package again."
                )
            exponents[name] = stored.read()
    except CheckpointError as error:
        raise PackageError(str(error)) from None
    return FoldedCheckpoint(original, ChannelScales(exponents))
