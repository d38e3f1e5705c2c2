"""A model package: a folder whose manifest lists every file with its size and hash."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.targets.contents import DATA_FILE as DATA_FILE
from llama_onnx.targets.contents import MODEL_FILE as MODEL_FILE
from llama_onnx.targets.contents import check_contents
from llama_onnx.targets.durable import replace_file
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.folder_files import is_plain_name
from llama_onnx.targets.listing import (
    BESIDE,
    SIGNATURE_SUFFIX,
    WORKING_FILES,
    Unlisted,
    altered_files,
    check_present,
    find_unlisted,
    hash_file,
    read_listing,
    signature_files,
)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ADAPTER_FOLDER, ADAPTER_SUFFIX = "adapters", ".onnx_adapter"
CHANNEL_SCALES = "channel_scales.safetensors"
"""How channels were rescaled, without effect on the function, before they were quantized."""
PARTIAL_SUFFIX = ".partial"
"""An export writes to `OUT.partial` and renames it at the end."""

INFERENCE_MODEL = "inference_model.json"
"""Foundry Local's description of a model."""

BOM = "bom.cdx.json"
"""A bundle's bill of materials; CycloneDX asks for this ending."""

_BUNDLE_FILES = ("bundle.json", f"bundle.json{SIGNATURE_SUFFIX}", INFERENCE_MODEL, BOM)
"""Beside a package's own files in a bundle for the hub, or for Foundry Local."""

_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
_TYPES = {"target": str, "precision": str, "recipe": dict, "source": dict}


@dataclass(frozen=True)
class ModelPackage:
    """An opened package: its manifest has been read, and all its files are there and only data."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> ModelPackage:
        """Read the manifest in the folder `path`, and check what a library would act on.

        Every listed file must be there with its size, and graph and settings must be what exports
        write. `verify` compares the contents with their hashes. Raises `PackageError`.
        """
        path = Path(path)
        package = cls(path, _read_manifest(path))
        check_present(path, package.files)
        tokenizer = package.has_tokenizer
        check_contents(path, MANIFEST, package.files, _BUNDLE_FILES, tokenizer=tokenizer)
        return package

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """The files that the manifest lists: name -> size in bytes and sha256."""
        files: Mapping[str, Mapping[str, Any]] = self.manifest["files"]
        return files

    @property
    def index(self) -> Path:
        """The manifest, which lists every other file by hash and is the file that is signed."""
        return self.path / MANIFEST

    @property
    def listing(self) -> Mapping[str, Any]:
        """The content of the manifest."""
        return self.manifest

    @property
    def target(self) -> str:
        """The name of the target that the package was made for."""
        return str(self.manifest["target"])

    @property
    def precision(self) -> str:
        """How the weights are stored: "fp32", "fp16", "bf16", "int8" or "int4"."""
        return str(self.manifest["precision"])

    @property
    def model_path(self) -> Path:
        """The file of the graph."""
        return self.path / MODEL_FILE

    @property
    def data_path(self) -> Path:
        """The file of the weights."""
        return self.path / DATA_FILE

    @property
    def adapters(self) -> Mapping[str, Mapping[str, Any]]:
        """The LoRA adapters that can be swapped at run time: name -> rank, alpha and more."""
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
                f"{self.path} has no tokenizer and takes token ids only: to use text, add the "
                "tokenizer to the checkpoint and export it without --no-tokenizer."
            )

    @classmethod
    def unchecked(cls, path: Path) -> ModelPackage | None:
        """Read only the manifest in `path`; None if it is not valid. Other files may be missing."""
        try:
            return cls(path, _read_manifest(path))
        except PackageError:
            return None

    def adapter_path(self, name: str) -> Path:
        """Return the file of the adapter `name`. Raises `UsageError`, listing the existing ones."""
        if name in self.adapters:
            return self.path / str(self.adapters[name]["file"])
        known = ", ".join(self.adapters)
        there = f"it has {known}" if known else "it has none (`export --keep-adapter` makes them)"
        raise UsageError(f"{self.path} has no adapter {name!r}: {there}.")

    def verify(self, names: Collection[str] | None = None) -> list[str]:
        """Read every file, or those called `names`, and return the names of those that are missing
        or were changed."""
        chosen = {n: f for n, f in self.files.items() if names is None or n in names}
        return altered_files(self.path, chosen)

    def unlisted(self) -> Unlisted:
        """Return what the manifest does not list, so that no hash covers it."""
        return find_unlisted(self.index, self.files, BESIDE)


def write_manifest(
    folder: Path,
    content: Mapping[str, Any],
    hashes: Mapping[str, str] | None = None,
) -> ModelPackage:
    """Write the manifest of `folder`: `content`, plus the size and sha256 of every file in it.

    `hashes` maps names to sha256 values that are known already, so that a data file of many
    gigabytes is not read again. The manifest is written completely or not at all; the signature of
    an older one is removed.
    """
    known = hashes or {}
    signatures = [file.name for file in signature_files(folder / MANIFEST)]
    ours = {MANIFEST, *signatures, *_unfinished(folder)}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in ours:
            files[name] = {
                "size": path.stat().st_size,
                "sha256": known.get(name) or hash_file(path),
            }
    return _save(folder, {"format_version": FORMAT_VERSION, **content, "files": files})


def _save(folder: Path, manifest: Mapping[str, Any]) -> ModelPackage:
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    for signature in signature_files(folder / MANIFEST):
        signature.unlink(missing_ok=True)
    replace_file(folder / MANIFEST, text.encode())
    return ModelPackage(folder, manifest)


def name_package(package: ModelPackage, signature: Path) -> ModelPackage:
    """Record the name of its folder in the manifest of `package`, for `signature` to cover it.

    A manifest that another signature covers is left as it is. Raises `UsageError` if that one is of
    a package of another name.
    """
    name, recorded = package.path.resolve().name, package.manifest.get("name")
    if recorded == name:
        return package
    others = [
        file for file in signature_files(package.index) if file.exists() and file != signature
    ]
    if others and recorded is None:
        return package
    if others:
        raise UsageError(
            f"{package.path} was signed as {recorded}: give the folder that name again, or delete "
            f"{others[0].name}, repeat the call, and sign again."
        )
    content = {key: value for key, value in package.manifest.items() if key != "files"}
    return _save(package.path, {**content, "name": name, "files": package.manifest["files"]})


def renew_manifest(
    package: ModelPackage, *, rewritten: Collection[str] = (), **content: Any
) -> ModelPackage:
    """Write a new manifest after files were added to `package`; `content` replaces its keys.

    Files that are already listed keep their hash and are not read, except those in `rewritten`.
    Raises `UsageError` for a signed package.
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
    """Remove the files that a killed export, or a killed `sign`, left in a finished package."""
    for name in _unfinished(folder):
        (folder / name).unlink(missing_ok=True)


def _unfinished(folder: Path) -> Iterator[str]:
    yield from WORKING_FILES
    for file in (folder / MANIFEST, *signature_files(folder / MANIFEST)):
        yield f"{file.name}.tmp"


def check_unsigned(package: ModelPackage) -> None:
    """Raise `UsageError` for a signed package: a change would make its signature invalid."""
    for signature in signature_files(package.index):
        if signature.exists():
            raise UsageError(
                f"{package.path} is signed, and a change would make the signature invalid: delete "
                f"{signature.name}, repeat the call, then sign the package again."
            )


def check_changeable(package: ModelPackage) -> None:
    """Raise `UsageError` for a package that nothing can be added to: a signed one, and one with
    links or folders that are not its own, where what is added could land elsewhere."""
    check_unsigned(package)
    for name in package.unlisted().unknown:
        path = package.path / name
        killed = name.endswith(f"{PARTIAL_SUFFIX}/")  # the next call removes it
        if path.is_symlink() or not (path.is_file() or killed):
            raise UsageError(f"{path} is not part of the package: remove it first.")


def find_package(folder: Path) -> Path:
    """Return the package that `folder` is or contains, at most three folders deep.

    Raises `PackageError` unless there is exactly one.
    """
    found = sorted(
        file.parent for depth in range(4) for file in folder.glob("*/" * depth + MANIFEST)
    )
    if len(found) != 1:
        raise PackageError(
            f"{folder} must be a package or contain exactly one, but {len(found)} were found: "
            f"put one package, with its {MANIFEST}, there."
        )
    return found[0]


def is_package(path: Path) -> bool:
    """Return whether `path` is a folder with a valid manifest; other files are not checked."""
    return ModelPackage.unchecked(path) is not None


def _read_manifest(path: Path) -> dict[str, Any]:
    _check_folder(path)
    manifest = read_listing(path / MANIFEST, FORMAT_VERSION)
    _check_manifest(manifest, path / MANIFEST)
    return manifest


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # a name that the system does not take
        raise PackageError(f"{path} cannot be opened: {error.strerror}.") from None


def _check_folder(path: Path) -> None:
    if path.name.endswith(PARTIAL_SUFFIX):
        raise PackageError(
            f"{path} is an unfinished export: finish it with `llama-onnx export --resume`."
        )
    if _is_folder(path):
        return
    if _is_folder(path.with_name(path.name + PARTIAL_SUFFIX)):
        raise PackageError(
            f"{path} does not exist, only the unfinished export {path.name}{PARTIAL_SUFFIX}: "
            "finish it with `llama-onnx export --resume`."
        )
    what = "is a file, not a package folder" if path.exists() else "does not exist"
    raise PackageError(f"{path} {what}.")


def _check_manifest(manifest: dict[str, Any], file: Path) -> None:
    for key, kind in _TYPES.items():
        if not isinstance(manifest.get(key), kind):
            raise PackageError(f"{file} is damaged: {key!r} is missing or has the wrong type.")
    if manifest["precision"] not in _PRECISIONS:
        raise PackageError(f"{file} is damaged: its precision is none of {', '.join(_PRECISIONS)}.")
    # Never part of a path: a name in a folder at most.
    if not is_plain_name(manifest["target"]) or "/" in manifest["target"]:
        raise PackageError(f"{file} is damaged: its target is not a name.")
    _check_adapters(manifest, file)


def _check_adapters(manifest: dict[str, Any], file: Path) -> None:
    adapters = manifest.get("adapters", {})
    if not isinstance(adapters, dict):
        raise PackageError(f"{file} is damaged: 'adapters' has the wrong type.")
    for name, entry in adapters.items():
        its_file = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(its_file, str) or its_file not in manifest["files"]:
            raise PackageError(f"{file} is damaged: its adapter {name!r} has no file.")
