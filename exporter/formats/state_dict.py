"""A file of weights: safetensors, or pickled by `torch.save`."""

from __future__ import annotations

from pathlib import Path

from llama_onnx.exporter.formats.safetensors import read_safetensors
from llama_onnx.exporter.formats.tensor import LazyTensor


def read_state_dict(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of the file at `path` by name, none of them read.

    A name that ends in `.safetensors` is read as safetensors, any other as pickled. Raises
    `CheckpointError` or `UnsupportedError` as the reader of the format does.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    # Imported here: torch takes seconds to load, and safetensors do not need it.
    from llama_onnx.exporter.formats.torch_file import read_torch_file

    return read_torch_file(path)
