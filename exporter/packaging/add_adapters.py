"""Adds adapters to a finished package without changing its graph or weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.checkpoints.package.same_model import check_same_model
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.adapters import KeptAdapter, open_kept
from llama_onnx.exporter.packaging.provenance import package_file
from llama_onnx.exporter.packaging.trial import try_package
from llama_onnx.targets.durable import flush
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage, check_changeable, renew_manifest


def add_adapters(path: Path, base: Checkpoint, folders: Mapping[str, Path]) -> list[str]:
    """Add the PEFT adapters in `folders`, by name, to those of the package at `path`.

    `base` is the checkpoint the package was made from. Each adapter runs a step before it is added
    to the manifest; if one fails, the package is left unchanged. Returns warnings for people.

    Raises `UsageError` when the package is signed, was made from another model, already has an
    adapter of that name, or has a graph that cannot swap a matrix that an adapter changes.
    """
    package = ModelPackage.open(path)
    check_changeable(package)
    check_same_model(PackageCheckpoint.open(path), base)
    adapters = open_kept(base, folders)
    _check_addable(package, adapters)
    try:
        for adapter in adapters:
            adapter.write(path)
            flush(path / adapter.file)
        try_package(path, base.config, [adapter.file for adapter in adapters])
    except BaseException:
        for adapter in adapters:
            (path / adapter.file).unlink(missing_ok=True)
        raise
    for adapter in adapters:
        _copy_licences(adapter, path)
    entries = {adapter.name: adapter.describe() for adapter in adapters}
    renew_manifest(package, adapters={**package.adapters, **entries})
    return [
        warning
        for adapter in adapters
        for warning in (*adapter.warnings, *adapter.tokenizer_warning(path))
    ]


def _check_addable(package: ModelPackage, adapters: Sequence[KeptAdapter]) -> None:
    swappable = package.manifest["recipe"].get("swappable", [])
    taken = {name.casefold() for name in package.adapters}
    for adapter in adapters:
        if adapter.name.casefold() in taken:
            raise UsageError(
                f"{package.path} already has an adapter {adapter.name!r}: pass another name, "
                f"NAME={adapter.folder}."
            )
        missing = [kind for kind in adapter.kinds if kind not in swappable]
        if missing:
            raise UsageError(
                f"{adapter.folder} changes {', '.join(missing)}, which the graph of "
                f"{package.path} cannot swap: export it again with all its adapters."
            )


def _copy_licences(adapter: KeptAdapter, package: Path) -> None:
    # Under the adapter's name, since the base has files of the same names.
    for file in adapter.licence_files():
        copy = package / package_file(file, f"-{adapter.name}")
        shutil.copyfile(file, copy)
        flush(copy)
