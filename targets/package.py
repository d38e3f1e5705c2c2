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
SIGNATURE_SUFFIX = ".sig"
"""Of the file beside a manifest, or a bundle.json, that signs it."""
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
ADAPTER_FOLDER, ADAPTER_SUFFIX = "adapters", ".onnx_adapter"
PARTIAL_SUFFIX = ".partial"
"""An export in progress writes to `OUT.partial` and renames it when it is done."""

BESIDE = ("SHA256SUMS", "selftest.txt", "README.md")
"""Files that bundles put into a package, beside what its manifest names."""

WORKING_FILES = ("journal.jsonl", "journal.jsonl.tmp", "journal.lock")
"""What an export in progress keeps in its folder: never part of a package. A kill between the last
rename and their removal leaves them in a finished one."""

_TYPES = {"target": str, "precision": str, "recipe": dict, "source": dict}


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
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """What it names: file -> size and sha256."""
        files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        return files

    @property
    def index(self) -> Path:
        """The file that names all others, with their hashes: what a signature signs."""
        return self.path / MANIFEST

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

    @property
    def has_tokenizer(self) -> bool:
        """Whether it takes text; a package without a tokenizer takes token ids only."""
        return self.manifest.get("tokenizer") is not False

    def require_tokenizer(self) -> None:
        """Raise `UsageError` for a package that takes token ids only."""
        if not self.has_tokenizer:
            raise UsageError(
                f"{self.path} has no tokenizer and takes token ids only: to give it text, export "
                "it again without --no-tokenizer."
            )

    @classmethod
    def unchecked(cls, path: Path) -> ModelPackage | None:
        """Read the manifest in `path` alone, None without a valid one: files may be missing."""
        try:
            return cls(path, _read_manifest(path))
        except PackageError:
            return None

    def adapter_path(self, name: str) -> Path:
        """The file of the adapter `name`; raises `UsageError` naming those there are."""
        if name in self.adapters:
            return self.path / str(self.adapters[name]["file"])
        known = ", ".join(self.adapters)
        there = f"it has {known}" if known else "it has none (`export --keep-adapter` makes them)"
        raise UsageError(f"{self.path} has no adapter {name!r}: {there}.")

    def verify(self) -> list[str]:
        """Read every file and return the names of those whose content is not what was written."""
        return altered_files(self.path, self.files)

    def unnamed(self) -> list[str]:
        """Files that the manifest does not name, so that nothing is known about them."""
        return unnamed_files(self.index, {*self.files, *BESIDE})


def write_manifest(
    folder: Path,
    content: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
) -> ModelPackage:
    """Write `folder`'s manifest: `content`, plus size and sha256 of every file in the folder.

    A signature of an older manifest goes.

    `hashes` holds the sha256 of files whose hash is already known, by name: a data file of many
    gigabytes need not be read again. The manifest appears whole or not at all.
    """
    known = hashes or {}
    signature = folder / (MANIFEST + SIGNATURE_SUFFIX)
    temporary = folder / f"{MANIFEST}.tmp"
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in (MANIFEST, temporary.name, signature.name, *WORKING_FILES):
            files[name] = {
                "size": path.stat().st_size,
                "sha256": known.get(name) or hash_file(path),
            }
    manifest = {"format_version": FORMAT_VERSION, **content, "files": files}
    temporary.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
    signature.unlink(missing_ok=True)
    temporary.replace(folder / MANIFEST)
    return ModelPackage(folder, manifest)


def renew_manifest(
    package: ModelPackage, *, rewritten: Collection[str] = (), **content: Any
) -> ModelPackage:
    """Write the manifest of `package` anew after files were added to it: `content` replaces keys.

    Files that it names already keep their hash unless they are `rewritten`: they are not read.
    Raises `UsageError` for a package that is signed.
    """
    check_unsigned(package)
    remove_working_files(package.path)
    known = {
        name: entry["sha256"]
        for name, entry in package.manifest["files"].items()
        if name not in rewritten
    }
    return write_manifest(package.path, {**package.manifest, **content}, known)


def remove_working_files(folder: Path) -> None:
    """Remove from a finished package what an export kept there while it ran."""
    for name in WORKING_FILES:
        (folder / name).unlink(missing_ok=True)


def check_unsigned(package: ModelPackage) -> None:
    """Raise `UsageError` for a signed package, whose signature a change would make void."""
    signature = package.index.with_name(MANIFEST + SIGNATURE_SUFFIX)
    if signature.exists():
        raise UsageError(
            f"{package.path} is signed, and would not be what was signed: delete {signature.name}, "
            "repeat the call, and sign the package anew."
        )


def is_package(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of ours, however damaged the rest may be."""
    return ModelPackage.unchecked(path) is not None


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def altered_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Read all `files` in `folder` and return the names of those without the sha256 given there."""
    return [name for name in files if not _is_intact(folder / name, files[name]["sha256"])]


def unnamed_files(index: Path, named: Collection[str]) -> list[str]:
    """Files beside `index` or below, besides itself and its signature, that are not `named`.

    Those with a dot in front, which systems and version control leave, are not looked at.
    """
    known = {*named, index.name, index.name + SIGNATURE_SUFFIX}
    there = (path.relative_to(index.parent) for path in index.parent.rglob("*") if path.is_file())
    seen = {path.as_posix() for path in there if not any(p.startswith(".") for p in path.parts)}
    return sorted(seen - known)


def read_index(file: Path, format_version: int) -> dict[str, Any]:
    """Read a file that names all others beside it by size and sha256, and check that it does.

    Raises `PackageError`; also for one with a format above `format_version`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackageError(
            f"{file.parent} is not a llama-onnx package: it has no {file.name}."
        ) from None
    except OSError as error:
        raise PackageError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise PackageError(f"{file} is damaged: it is not valid JSON.") from None
    _check_index(content, file, format_version)
    return dict(content)


def _read_manifest(path: Path) -> dict[str, Any]:
    _check_folder(path)
    manifest = read_index(path / MANIFEST, FORMAT_VERSION)
    _check_manifest(manifest, path / MANIFEST)
    return manifest


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


def _check_index(content: Any, file: Path, format_version: int) -> None:
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or version < 1:
        raise PackageError(f"{file} is damaged: it has no format_version.")
    if version > format_version:
        raise PackageError(
            f"{file.parent} has package format {version}, but this llama-onnx reads format "
            f"{format_version} at most: upgrade llama-onnx."
        )
    _check_type(content, "files", dict, file)
    for name, entry in content["files"].items():
        if not (_is_inside(name) and _is_entry(entry)):
            raise PackageError(f"{file} is damaged: its entry for {name!r} makes no sense.")


def _check_manifest(manifest: dict[str, Any], file: Path) -> None:
    for key, kind in _TYPES.items():
        _check_type(manifest, key, kind, file)
    _check_adapters(manifest, file)


def _check_type(content: dict[str, Any], key: str, kind: type, file: Path) -> None:
    if not isinstance(content.get(key), kind):
        raise PackageError(f"{file} is damaged: {key!r} is missing or not what it should be.")


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
