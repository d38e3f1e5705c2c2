"""Licences travel with the weights: what stands beside a checkpoint goes into its package."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llama_onnx.exporter.checkpoints.hub import hub_origin
from llama_onnx.exporter.model.checkpoint import Checkpoint, has_licence

LLAMA_2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, "
    "Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
)
"""What the Llama 2 Community License (1.b.iii) asks to be kept in a NOTICE file."""


def copy_licences(
    checkpoint: Checkpoint, folder: Path, others: Sequence[Path] = ()
) -> tuple[str, ...]:
    """Copy licence, use policy, notice and model card to `folder`, and `others`, which belong to
    what travels with the model; returns warnings for people.

    A checkpoint whose path says Llama 2 gets the NOTICE its licence asks for, if it brings none.
    """
    files = checkpoint.licence_files()
    _copy([*files, *others], folder)
    llama_2 = is_llama_2(checkpoint.path)
    if llama_2 and not any(file.name.upper().startswith("NOTICE") for file in files):
        (folder / "NOTICE").write_bytes(LLAMA_2_NOTICE.encode())
    missing = [] if has_licence(files) else ["licence"]
    if llama_2 and not any(file.name.upper().startswith("USE_POLICY") for file in files):
        missing.append("use policy")
    if not missing:
        return ()
    what = " and ".join(missing)
    return (
        f"{checkpoint.path} has no {what} file, so the package has none: add the model's {what} "
        "before you pass the package on.",
    )


def is_llama_2(path: Path) -> bool:
    """Whether the name of a checkpoint's file or folder, or of the folder it lies in, says so."""
    origin = hub_origin(path)
    names = origin.repo if origin else " ".join(path.resolve().parts[-2:])
    return re.search(r"(?<![a-z])llama[-_ ]?2(?![0-9])", names, re.IGNORECASE) is not None


def _copy(files: Sequence[Path], folder: Path) -> None:
    seen: Counter[str] = Counter()
    for file in files:
        # A model card is kept, but not as the package's own README.
        name = Path("MODEL_CARD.md" if file.name == "README.md" else file.name)
        seen[name.name] += 1
        # An adapter has a licence of its own beside the base's, often under the same name.
        suffix = f"-{seen[name.name]}" if seen[name.name] > 1 else ""
        shutil.copyfile(file, folder / f"{name.stem}{suffix}{name.suffix}")
