"""Open a checkpoint of any format, detected from the files at the path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.package import is_package
from llama_onnx.targets.printable import printable

_FILES_OF_FOLDERS = ("config.json", "params.json", "model.safetensors.index.json")
_SUFFIXES_OF_FOLDERS = (".safetensors", ".bin", ".pth", ".pt")


def open_checkpoint(
    path: Path, adapters: Sequence[Path] = (), *, context: int | None = None
) -> Checkpoint:
    """Open the checkpoint at `path`: a folder in Hugging Face's or Meta's format, a `.gguf` file or
    a folder that holds one. The LoRA `adapters` are merged into it in the order given. `context`
    replaces the number of positions that the checkpoint states.

    Reads headers only. Raises `CheckpointError` if the checkpoint is incomplete or an adapter does
    not fit it.
    """
    checkpoint = _open_base(path, context)
    for folder in adapters:
        from llama_onnx.exporter.checkpoints.lora import open_adapter

        checkpoint = open_adapter(checkpoint, folder)
    return checkpoint


def _open_base(path: Path, context: int | None) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: pass a checkpoint folder or a .gguf file.")
    if path.is_file():
        return _open_file(path, context)
    if is_package(path):
        raise CheckpointError(
            f"{path} is a package, not a checkpoint: pass the checkpoint that it was made from."
        )
    if os.path.lexists(path / "config.json"):
        return _open_huggingface(path, context)
    if os.path.lexists(path / "params.json"):
        from llama_onnx.exporter.checkpoints.meta import MetaCheckpoint

        return MetaCheckpoint.open(path, context)
    if (path / "adapter_config.json").exists():
        raise CheckpointError(_describe_adapter(path))
    named = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    ggufs = [file for file in named if file_inside(path, file.name)]
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0], context)
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{path} holds several GGUF files ({names}): pass one of them.")
    raise CheckpointError(
        f"{path} has no config.json, params.json or .gguf file: pass a checkpoint folder."
    )


def _open_file(path: Path, context: int | None) -> Checkpoint:
    """Open a file that is a whole checkpoint. GGUF is known by its first bytes too: the blobs of
    the hub's and of Ollama's cache have no suffix."""
    if path.suffix.lower() == ".gguf" or _begins_as_gguf(path):
        return _open_gguf(path, context)
    if path.name in _FILES_OF_FOLDERS or path.suffix in _SUFFIXES_OF_FOLDERS:
        raise CheckpointError(
            f"{path} is one file of a checkpoint: pass its folder, {path.parent}, as SOURCE."
        )
    raise CheckpointError(
        f"{path} is a file, but not a .gguf file: pass the folder of the checkpoint."
    )


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _describe_adapter(path: Path) -> str:
    """Return the sentence about an adapter's folder that is passed as a checkpoint."""
    try:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    except CheckpointError:
        base = None
    named = f" ({printable(base)})" if base and isinstance(base, str) else ""
    return (
        f"{path} is a LoRA adapter, not a model: pass its base{named} as SOURCE and the adapter "
        f"with --adapter {path}."
    )


def _open_huggingface(path: Path, context: int | None) -> Checkpoint:
    from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
    from llama_onnx.exporter.checkpoints.quantized.compressed import open_compressed
    from llama_onnx.exporter.checkpoints.quantized.compressed_config import read_compressed_config
    from llama_onnx.exporter.checkpoints.quantized.folder import open_quantized
    from llama_onnx.exporter.checkpoints.quantized.left_over import without_left_over
    from llama_onnx.exporter.checkpoints.quantized.settings import (
        is_bitsandbytes,
        read_quantization,
    )

    raw = read_json(path / "config.json")
    if is_bitsandbytes(raw):
        return without_left_over(HuggingFaceCheckpoint.open(path, context))
    # Before the folder is opened: an unknown quantization explains more than unexpected tensors do.
    if compressed := read_compressed_config(path, raw):
        return open_compressed(HuggingFaceCheckpoint.open(path, context), compressed)
    quantization = read_quantization(path, raw)
    plain = HuggingFaceCheckpoint.open(path, context)
    return plain if quantization is None else open_quantized(plain, quantization)


def _open_gguf(path: Path, context: int | None) -> Checkpoint:
    from llama_onnx.exporter.checkpoints.gguf import GGUFCheckpoint

    return GGUFCheckpoint.open(path, context)
