"""Whether the source's files are the same at the end of an export as at its start.

Headers are read first, weights an hour later perhaps: if a download or a training run replaces a
file in between, the package would be of two models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_onnx.exporter.checkpoints.lora import adapter_files, adapters_of
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.adapters import KeptAdapter
from llama_onnx.exporter.packaging.provenance import source_path
from llama_onnx.targets.errors import CheckpointError

_BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

State = tuple[int, int, int]
"""Size, time of modification in nanoseconds, and inode."""


def source_state(
    checkpoint: Checkpoint, kept: Sequence[KeptAdapter]
) -> Mapping[Path, State | None]:
    """Return the state of every file that an export reads; None for one that is not there."""
    files = [source_path(checkpoint, name) for name in checkpoint.fingerprint()]
    folders = [checkpoint.path] if checkpoint.path.is_dir() else []
    folders += [*adapters_of(checkpoint), *(adapter.folder for adapter in kept)]
    files += [file for adapter in kept for file in adapter_files(adapter.folder)]
    files += [folder / name for folder in folders for name in _BESIDE]
    return {file: _state(file) for file in files}


def check_unchanged(before: Mapping[Path, State | None]) -> None:
    """Raise `CheckpointError` naming the files whose state is no longer that of `before`."""
    changed = [file for file, state in before.items() if _state(file) != state]
    if changed:
        raise CheckpointError(
            f"{_listed(changed)} changed while the export read it, so nothing was written: repeat "
            "the export when the source is complete."
        )


def _listed(files: Sequence[Path]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0]}{more}"


def _state(file: Path) -> State | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
