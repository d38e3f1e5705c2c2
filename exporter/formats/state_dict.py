"""A weight file: safetensors, or a pickle written by `torch.save`."""

from __future__ import annotations

from pathlib import Path

from llama_onnx.exporter.formats.safetensors import read_safetensors
from llama_onnx.exporter.formats.tensor import LazyTensor


def read_state_dict(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of the file at `path` by name, without reading their values.

    A file whose name ends in `.safetensors` is read as safetensors, any other as a pickle. Raises
    `CheckpointError` or `UnsupportedError` as the format's reader does.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    # Imported here: torch takes seconds to load, and safetensors files do not need it.
    from llama_onnx.exporter.formats.torch_file import read_torch_file

    return read_torch_file(path)
