"""A model package: the folder that ships. Its manifest names every file, with size and hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llama_onnx.targets.errors import PackageError, UsageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
ADAPTER_FOLDER, ADAPTER_SUFFIX = "adapters", ".onnx_adapter"
PARTIAL_SUFFIX = ".partial"
"""An export in progress writes to `OUT.partial` and renames it when it is done."""

_TYPES = {"target": str, "precision": str, "recipe": dict, "source": dict, "files": dict}


@dataclass(frozen=True)
class ModelPackage:
    """A package on disk, opened: its manifest is read and its files are there."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> ModelPackage:
        """Read the manifest in `path` and check that each file it names is there in full.

        Contents are not read: that is what `verify` does. Raises `PackageError`.
        """
        path = Path(path)
        package = cls(path, _read_manifest(path))
        for name, entry in package.manifest["files"].items():
            _check_size(path / name, entry["size"])
        return package

    @property
    def target(self) -> str:
        """Name of the target that the package was made for."""
        return str(self.manifest["target"])

    @property
    def precision(self) -> str:
        """What the weights are stored in: "fp32", "fp16", "int8" or "int4"."""
        return str(self.manifest["precision"])

    @property
    def model_path(self) -> Path:
        """The graph."""
        return self.path / MODEL_FILE

    @property
    def data_path(self) -> Path:
        """The weights."""
        return self.path / DATA_FILE

    @property
    def adapters(self) -> Mapping[str, Mapping[str, Any]]:
        """The LoRA adapters that can be swapped at run time: name -> rank, alpha, targets ..."""
        adapters: Mapping[str, Mapping[str, Any]] = self.manifest.get("adapters", {})
        return adapters

    def adapter_path(self, name: str) -> Path:
        """The file of the adapter `name`; raises `UsageError` naming those there are."""
        if name in self.adapters:
            return self.path / str(self.adapters[name]["file"])
        known = ", ".join(self.adapters)
        there = f"it has {known}" if known else "it has none (`export --keep-adapter` makes them)"
        raise UsageError(f"{self.path} has no adapter {name!r}: {there}.")

    def verify(self) -> list[str]:
        """Read every file and return the names of those whose content is not what was written."""
        files = self.manifest["files"]
        return [name for name in files if not _is_intact(self.path / name, files[name]["sha256"])]


def write_manifest(
    folder: Path,
    content: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
    *,
    leave_out: Collection[str] = (),
) -> ModelPackage:
    """Write `folder`'s manifest: `content`, plus size and sha256 of every file in the folder.

    Files called as in `leave_out` are none of the package's.

    `hashes` holds the sha256 of files whose hash is already known, by name: a data file of many
    gigabytes need not be read again. The manifest appears whole or not at all.
    """
    known = hashes or {}
    temporary = folder / f"{MANIFEST}.tmp"
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in (MANIFEST, temporary.name, *leave_out):
            files[name] = {
                "size": path.stat().st_size,
                "sha256": known.get(name) or hash_file(path),
            }
    manifest = {"format_version": FORMAT_VERSION, **content, "files": files}
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(folder / MANIFEST)
    return ModelPackage(folder, manifest)


def renew_manifest(
    package: ModelPackage, *, rewritten: Collection[str] = (), **content: Any
) -> ModelPackage:
    """Write the manifest of `package` anew after files were added to it: `content` replaces keys.

    Files that it names already keep their hash unless they are `rewritten`: they are not read.
    """
    known = {
        name: entry["sha256"]
        for name, entry in package.manifest["files"].items()
        if name not in rewritten
    }
    return write_manifest(package.path, {**package.manifest, **content}, known)


def is_package(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of ours, however damaged the rest may be."""
    try:
        _read_manifest(path)
    except PackageError:
        return False
    return True


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    _check_folder(path)
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackageError(f"{path} is not a llama-onnx package: it has no {MANIFEST}.") from None
    except OSError as error:
        raise PackageError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise PackageError(f"{file} is damaged: it is not valid JSON.") from None
    _check_manifest(manifest, file)
    return dict(manifest)


def _check_folder(path: Path) -> None:
    if path.name.endswith(PARTIAL_SUFFIX):
        raise PackageError(
            f"{path} is an unfinished export: finish it with `llama-onnx export --resume`."
        )
    if path.is_dir():
        return
    if path.with_name(path.name + PARTIAL_SUFFIX).is_dir():
        raise PackageError(
            f"{path} does not exist, only the unfinished export {path.name}{PARTIAL_SUFFIX}: "
            "finish it with `llama-onnx export --resume`."
        )
    what = "is a file, not a package folder" if path.exists() else "does not exist"
    raise PackageError(f"{path} {what}.")


def _check_manifest(manifest: Any, file: Path) -> None:
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or version < 1:
        raise PackageError(f"{file} is damaged: it has no format_version.")
    if version > FORMAT_VERSION:
        raise PackageError(
            f"{file.parent} has package format {version}, but this llama-onnx reads format "
            f"{FORMAT_VERSION} at most: upgrade llama-onnx."
        )
    for key, kind in _TYPES.items():
        if not isinstance(manifest.get(key), kind):
            raise PackageError(f"{file} is damaged: {key!r} is missing or not what it should be.")
    for name, entry in manifest["files"].items():
        if not (_is_inside(name) and _is_entry(entry)):
            raise PackageError(f"{file} is damaged: its entry for {name!r} makes no sense.")
    _check_adapters(manifest, file)


def _check_adapters(manifest: dict[str, Any], file: Path) -> None:
    adapters = manifest.get("adapters", {})
    if not isinstance(adapters, dict):
        raise PackageError(f"{file} is damaged: 'adapters' is not what it should be.")
    for name, entry in adapters.items():
        its_file = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(its_file, str) or its_file not in manifest["files"]:
            raise PackageError(f"{file} is damaged: its adapter {name!r} has no file.")


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
    )


def _is_inside(name: str) -> bool:
    # A manifest comes from a stranger: it must not make us read outside of its folder.
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise PackageError(f"{path.parent} is incomplete: {path.name} is missing.") from None
    if size != expected:
        raise PackageError(
            f"{path} is damaged: it has {size:,} bytes, but {expected:,} were written."
        )


def _is_intact(path: Path, sha256: str) -> bool:
    try:
        return hash_file(path) == sha256
    except OSError:
        return False
