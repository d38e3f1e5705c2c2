"""Licenses travel with the weights: what lies beside a checkpoint goes into its package."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from llama_onnx.exporter.checkpoints.hub import hub_origin
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.targets.licences import (
    PACKAGE_CARD,
    kind_of,
    llama_generation,
    of_kind,
    required_kinds,
)

LLAMA_2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, "
    "Copyright (c) Meta Platforms, Inc. All Rights Reserved.\n"
)
"""What the Llama 2 Community License (1.b.iii) asks to be kept in a NOTICE file."""


def copy_licences(
    checkpoint: Checkpoint, folder: Path, others: Sequence[Path] = ()
) -> tuple[str, ...]:
    """Copy license, use policy, notice and model card to `folder`, then `others`, the files of
    adapters that the package holds too; return warnings for people.

    A Llama 2 without a NOTICE gets the one its license asks for.
    """
    files = checkpoint.licence_files()
    _copy([*files, *others], folder)
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
    """Return what a checkpoint is called: its hub name, or the names of its file or folder and of
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


def _copy(files: Sequence[Path], folder: Path) -> None:
    seen: Counter[str] = Counter()
    for file in files:
        # An adapter has a license too, often under the same name as the base's.
        name = package_file(file)
        seen[name] += 1
        suffix = f"-{seen[name]}" if seen[name] > 1 else ""
        shutil.copyfile(file, folder / package_file(file, suffix))
