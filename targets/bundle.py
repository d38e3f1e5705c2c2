"""A bundle on disk: a package and what one place needs, every file listed in bundle.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.listing import (
    BESIDE_ANY,
    Unlisted,
    altered_files,
    find_unlisted,
    hash_file,
    read_listing,
)
from llama_onnx.targets.package import MANIFEST, ModelPackage
from llama_onnx.targets.signature import Signer, write_signature

BUNDLE = "bundle.json"
SUMS = "SHA256SUMS"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: `content` is its bundle.json."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Read bundle.json in the folder `path`. Raises `PackageError`."""
        content = read_listing(path / BUNDLE, FORMAT_VERSION)
        about = content.get("package")
        if not (isinstance(about, dict) and isinstance(about.get("precision"), str)):
            raise PackageError(f"{path / BUNDLE} is damaged: it does not describe its package.")
        return cls(path, content)

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """The files that bundle.json lists: name -> size in bytes and sha256."""
        files: Mapping[str, Mapping[str, Any]] = self.content["files"]
        return files

    @property
    def index(self) -> Path:
        """bundle.json, which lists every other file by hash and is the file that is signed."""
        return self.path / BUNDLE

    @property
    def precision(self) -> str:
        """How the weights of its package are stored: "fp32", "fp16", "int8" or "int4"."""
        return str(self.content["package"]["precision"])

    @property
    def listing(self) -> Mapping[str, Any]:
        """The content of bundle.json."""
        return self.content

    @property
    def package(self) -> ModelPackage:
        """The package inside. Raises `PackageError` if it is in another form."""
        for folder in (self.path, self.path / "package"):
            if (folder / MANIFEST).is_file():
                return ModelPackage.open(folder)
        web = self.content.get("for") == "web"
        form = "its model in transformers.js's layout" if web else "its package as an archive"
        raise PackageError(f"{self.path} contains {form}, which cannot run: pass --files-only.")

    def verify(self, names: Collection[str] | None = None) -> list[str]:
        """Read every file, or those called `names`, and return the names of those that are missing
        or were changed."""
        chosen = {n: f for n, f in self.files.items() if names is None or n in names}
        return altered_files(self.path, chosen)

    def unlisted(self) -> Unlisted:
        """Return what bundle.json does not list, so that no hash covers it."""
        return find_unlisted(self.index, self.files, BESIDE_ANY)


def open_shipped(path: Path) -> ModelPackage | Bundle:
    """Open the package or the bundle in the folder `path`. Raises `PackageError`."""
    return Bundle.open(path) if (path / BUNDLE).is_file() else ModelPackage.open(path)


def write_bundle(folder: Path, content: Mapping[str, Any], sign: Signer | None = None) -> None:
    """Write `folder`/bundle.json: `content`, plus the size and sha256 of every other file.

    With `sign`, also write its signature, bundle.json.sig.
    """
    files = {
        name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for name, path in list_files(folder)
        if name != BUNDLE
    }
    bundle = {"format_version": FORMAT_VERSION, **content, "files": files}
    text = json.dumps(bundle, indent=2, ensure_ascii=False) + "\n"
    (folder / BUNDLE).write_bytes(text.encode())
    if sign:
        write_signature(folder / BUNDLE, sign)


def write_sums(folder: Path) -> None:
    """Write `folder`/SHA256SUMS, in the format of sha256sum, for every other file in it."""
    lines = [f"{hash_file(path)}  {name}\n" for name, path in list_files(folder) if name != SUMS]
    # As bytes: Windows would change the line endings, and bundle.json has this file's hash.
    (folder / SUMS).write_bytes("".join(lines).encode())


def list_files(folder: Path) -> list[tuple[str, Path]]:
    """Return all files below `folder`, sorted: relative name with forward slashes, and path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted((path.relative_to(folder).as_posix(), path) for path in paths)
