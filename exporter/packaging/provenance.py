"""What the source's files hash to, for the manifest.

Whoever publishes a model has hashed it: the hub names its large files by their sha256, Meta's
download brings md5 sums that the export compares anyway. Where nobody has, reading all of a source
once more is for the caller to ask for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.hub import hub_origin
from llama_onnx.exporter.checkpoints.lora import adapters_of
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.package import hash_file

_SHA256 = re.compile("[0-9a-f]{64}")


def source_hashes(
    checkpoint: Checkpoint,
    verified: Mapping[str, str],
    *,
    read: bool,
    step: Callable[[str], None],
) -> dict[str, Any] | None:
    """Hashes of the source's files by name, and `from` where they are known: by having `read` them
    now, from the hub, or from the checklist that was `verified` (md5 by name). None when nobody
    knows any."""
    if read:
        names = list(checkpoint.fingerprint())
        return {"from": "read", "sha256": {name: _read(checkpoint, name, step) for name in names}}
    if known := _hub_hashes(checkpoint):
        return {"from": "hub", "sha256": known}
    return {"from": "checklist.chk", "md5": dict(verified)} if verified else None


def _hub_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """In the hub's cache a large file is a link to a blob named by its sha256; a small one's blob
    is named by git, which hashes otherwise."""
    if hub_origin(checkpoint.path) is None:
        return {}
    blobs = {path.name: path.resolve().name for path in sorted(checkpoint.path.iterdir())}
    names = checkpoint.fingerprint().keys()
    return {name: sha for name, sha in blobs.items() if name in names and _SHA256.fullmatch(sha)}


def _read(checkpoint: Checkpoint, name: str, step: Callable[[str], None]) -> str:
    step(f"hashing {name}")
    path = _path(checkpoint, name)
    try:
        return hash_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


def _path(checkpoint: Checkpoint, name: str) -> Path:
    """The file that `fingerprint` calls `name`."""
    adapter = re.fullmatch(r"adapter (\d+)/(.+)", name)
    if adapter:
        return adapters_of(checkpoint)[int(adapter[1]) - 1] / adapter[2]
    if checkpoint.path.is_file():
        return checkpoint.path
    # Meta's download of several models keeps their tokenizer a folder above.
    beside, above = checkpoint.path / name, checkpoint.path.resolve().parent / name
    return above if above.exists() and not beside.exists() else beside
