"""Open a checkpoint of any format, detected from the files at the path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.package import is_package


def open_checkpoint(path: Path, adapters: Sequence[Path] = ()) -> Checkpoint:
    """Open the checkpoint at `path`: a folder in Hugging Face's or Meta's format, a `.gguf` file or
    a folder that holds one. The LoRA `adapters` are merged into it in the order given.

    Reads headers only. Raises `CheckpointError` if the checkpoint is incomplete or an adapter does
    not fit it.
    """
    checkpoint = _open_base(path)
    for folder in adapters:
        from llama_onnx.exporter.checkpoints.lora import open_adapter

        checkpoint = open_adapter(checkpoint, folder)
    return checkpoint


def _open_base(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: pass a checkpoint folder or a .gguf file.")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"{path} is a file, but not a .gguf file: pass the folder of the checkpoint."
            )
        return _open_gguf(path)
    if is_package(path):
        raise CheckpointError(
            f"{path} is a package, not a checkpoint: pass the checkpoint that it was made from."
        )
    if (path / "config.json").exists():
        return _open_huggingface(path)
    if (path / "params.json").exists():
        from llama_onnx.exporter.checkpoints.meta import MetaCheckpoint

        return MetaCheckpoint.open(path)
    named = sorted(path.glob("*.gguf"))
    ggufs = [file for file in named if file_inside(path, file.name)]
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{path} holds several GGUF files ({names}): pass one of them.")
    raise CheckpointError(
        f"{path} has no config.json, params.json or .gguf file: pass a checkpoint folder."
    )


def _open_huggingface(path: Path) -> Checkpoint:
    from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
    from llama_onnx.exporter.checkpoints.quantized.folder import open_quantized
    from llama_onnx.exporter.checkpoints.quantized.settings import read_quantization

    # Before the folder is opened: an unknown quantization explains more than unexpected tensors do.
    quantization = read_quantization(path, read_json(path / "config.json"))
    plain = HuggingFaceCheckpoint.open(path)
    return plain if quantization is None else open_quantized(plain, quantization)


def _open_gguf(path: Path) -> Checkpoint:
    from llama_onnx.exporter.checkpoints.gguf import GGUFCheckpoint

    return GGUFCheckpoint.open(path)
