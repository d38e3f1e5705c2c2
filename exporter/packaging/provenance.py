"""Where a package comes from: hashes of the source's files, and copies of its license files.

Publishers hash their models: the hub names large files by their sha256, and Meta's download has md5
sums that the export compares anyway. For other sources the caller decides whether to read all files
once more.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.hub import hub_origin
from llama_onnx.exporter.checkpoints.lora import adapters_of
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.licences import (
    PACKAGE_CARD,
    kind_of,
    llama_generation,
    of_kind,
    required_kinds,
)
from llama_onnx.targets.listing import hash_file

_SHA256 = re.compile("[0-9a-f]{64}")

LLAMA_2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, "
    "Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
)
"""The text that the Llama 2 Community License (1.b.iii) requires in a NOTICE file."""


def source_hashes(
    checkpoint: Checkpoint,
    verified: Mapping[str, str],
    *,
    read: bool,
    step: Callable[[str], None],
) -> dict[str, Any] | None:
    """Return hashes of the source's files by name, and in `from` their origin: "read" from the
    files now, the "hub", or the checklist that was `verified` (md5 by name). None without any.

    `step` is called with the file being read. Raises `CheckpointError` for one that cannot be read.
    """
    if read:
        names = list(checkpoint.fingerprint())
        return {"from": "read", "sha256": {name: _read(checkpoint, name, step) for name in names}}
    if known := _hub_hashes(checkpoint):
        return {"from": "hub", "sha256": known}
    return {"from": "checklist.chk", "md5": dict(verified)} if verified else None


def _hub_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    # In the hub's cache a large file is a link to a blob named by its sha256; the blob of a small
    # file is named by git, which hashes differently.
    if hub_origin(checkpoint.path) is None:
        return {}
    blobs = {path.name: path.resolve().name for path in sorted(checkpoint.path.iterdir())}
    names = checkpoint.fingerprint().keys()
    return {name: sha for name, sha in blobs.items() if name in names and _SHA256.fullmatch(sha)}


def _read(checkpoint: Checkpoint, name: str, step: Callable[[str], None]) -> str:
    step(f"hashing {name}")
    path = source_path(checkpoint, name)
    try:
        return hash_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


def source_path(checkpoint: Checkpoint, name: str) -> Path:
    """Return the file that `fingerprint` calls `name`."""
    adapter = re.fullmatch(r"adapter ([0-9]+)/(.+)", name)
    if adapter:
        return adapters_of(checkpoint)[int(adapter[1]) - 1] / adapter[2]
    if checkpoint.path.is_file():
        return checkpoint.path
    # Meta's download of several models keeps their tokenizer in the folder above.
    beside, above = checkpoint.path / name, checkpoint.path.resolve().parent / name
    return above if above.exists() and not beside.exists() else beside


def copy_licences(
    checkpoint: Checkpoint, folder: Path, others: Sequence[Path] = ()
) -> tuple[str, ...]:
    """Copy license, use policy, notice and model card to `folder`, then `others`, the files of
    its kept adapters; return warnings for people.

    A Llama 2 without a NOTICE gets the one its license requires.
    """
    files = checkpoint.licence_files()
    _copy_files([*files, *others], folder)
    names = [file.name for file in files]
    generation = llama_generation(model_name(checkpoint.path), files)
    if generation == 2 and not of_kind(names, "notice"):
        (folder / "NOTICE").write_bytes(LLAMA_2_NOTICE.encode())
    missing = [kind for kind in required_kinds(generation) if not of_kind(names, kind)]
    if not missing:
        return ()
    what = " and ".join(missing)
    return (
        f"{checkpoint.path} has no {what} file, so the package has none: add the model's {what} "
        "before you pass the package on.",
    )


def model_name(path: Path) -> str:
    """Return the name of a checkpoint: that on the hub, or the names of its file or folder and of
    the folder above, since downloads often end in one called `snapshot` or `hf`."""
    origin = hub_origin(path)
    return origin.repo if origin else " ".join(path.resolve().parts[-2:])


def package_file(file: Path, suffix: str = "") -> str:
    """Return the name that the license file or model card `file` gets in a package, with `suffix`
    before its extension.

    >>> package_file(Path("LICENSE.txt"), "-2"), package_file(Path("README.md"))
    ('LICENSE-2.txt', 'MODEL_CARD.md')
    """
    name = Path(PACKAGE_CARD if kind_of(file.name) == "model card" else file.name)
    return f"{name.stem}{suffix}{name.suffix}"


def _copy_files(files: Sequence[Path], folder: Path) -> None:
    seen: Counter[str] = Counter()
    for file in files:
        # An adapter has a license too, often under the same name as the base's.
        name = package_file(file)
        seen[name] += 1
        suffix = f"-{seen[name]}" if seen[name] > 1 else ""
        shutil.copyfile(file, folder / package_file(file, suffix))
