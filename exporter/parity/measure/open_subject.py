"""Opens a package and the checkpoint it was made from, once for all measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.lora import open_adapter
from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.checkpoints.package.same_model import check_same_model
from llama_onnx.exporter.model.checkpoint import Checkpoint, check_tensors
from llama_onnx.exporter.packaging.adapters import read_parameters
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.targets.errors import LlamaOnnxError, PackageError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.listing import read_listing
from llama_onnx.targets.package import FORMAT_VERSION, MANIFEST, ModelPackage


def open_subject(
    package: Path, original: Checkpoint, adapter: tuple[str, Path] | None = None
) -> Subject:
    """Open `package` beside the checkpoint `original`. Reads headers only.

    `adapter` is the name of an adapter that the package keeps beside its base, and the PEFT folder
    it was made from: it becomes active in the graph, and is added to both sets of weights.

    A damaged or altered file does not stop a package from being opened as long as its graph can be
    read. Raises `UsageError` when the two are not the same architecture, `PackageError` when the
    package cannot be read, `CheckpointError` when the checkpoint or the adapter cannot.
    """
    manifest = _read_manifest(package)
    with naming_altered(package):
        weights = PackageCheckpoint.open(package)
    check_same_model(weights, original)
    check_tensors(original)
    if adapter is None:
        return Subject(package, manifest, weights, original, weights, original)
    name, folder = adapter
    return Subject(
        package,
        manifest,
        weights,
        original,
        open_adapter(weights, folder),
        open_adapter(original, folder),
        read_parameters(ModelPackage(package, manifest).adapter_path(name)),
    )


@contextmanager
def naming_altered(package: Path) -> Iterator[None]:
    """Add to an error the files of `package` that changed since the export: one is its cause."""
    try:
        yield
    except LlamaOnnxError as error:
        opened = ModelPackage.unchecked(package)
        altered = opened.verify() if opened else []
        if not altered:
            raise
        reason = str(error).removesuffix(".")
        raise type(error)(f"{reason}: {', '.join(altered)} changed since the export.") from error


def _read_manifest(package: Path) -> Mapping[str, Any]:
    # Not `ModelPackage.open`, which refuses files of another size: they must be measured too.
    file = package / MANIFEST
    if not file.exists():
        return {}
    manifest = read_listing(file, FORMAT_VERSION)
    for name in manifest["files"]:
        file_inside(package, name, PackageError)  # which refuses what nobody should open
    return manifest
