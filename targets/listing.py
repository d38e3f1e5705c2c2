"""A file that lists all others in its folder by size and sha256: manifest.json, bundle.json.

Such a folder may come from a stranger: a listed file must be a regular file in the folder, and what
the list does not name is not part of it. What may be there all the same is listed here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.folder_files import file_inside, is_plain_name
from llama_onnx.targets.package_json import read_package_json

SIGNATURE_SUFFIX = ".sig"
"""Appended to the name of a manifest or bundle.json: its signature."""

WORKING_FILES = ("journal.jsonl", "journal.jsonl.tmp", "journal.lock")
"""Files that an export keeps in its folder while it runs; never part of a package. They remain in a
finished package if the export was killed between the last rename and their removal."""

CALIBRATION_FOLDER = "calibration"
"""Folder that an export keeps in its own while it runs; removed before the manifest is written."""

OMS_SIGNATURE = "model.sig"
"""The signature of OpenSSF's model signing, beside a manifest or bundle.json."""

BESIDE_ANY = (OMS_SIGNATURE, "sbom.cdx.json", "sbom.spdx.json")
"""Files that may be beside a package or a bundle without being listed: the signature of OpenSSF's
model-signing, and a bill of materials."""

BESIDE = ("SHA256SUMS", "selftest.txt", "README.md", *BESIDE_ANY)
"""Files that may be beside a package without being listed: those that bundles add, and the above.
Nothing that runs a model reads them, except the C library the first two, which it takes for no more
than they are: hashes, and token ids."""

TOLERATED = (".gitattributes", ".cache/huggingface/", *WORKING_FILES)
"""Files, and a folder, that tools leave in a package: the hub, a download from it, and a killed
export; besides, what a killed `sign` leaves. No program that runs a model reads them. `verify`
names them."""

MAX_FILES = 10_000
"""Most files that a list may name, and that are looked at in a folder."""

_MAX_BYTES = 16 << 20
"""Largest list: the manifest of Llama 3.1 405B, with the costs of its nodes, has 1 MB."""


@dataclass(frozen=True)
class Unlisted:
    """What is in a folder besides the listed files: `unknown`, and `tolerated` by `TOLERATED`."""

    unknown: tuple[str, ...]
    tolerated: tuple[str, ...]


def signature_files(index: Path) -> tuple[Path, Path]:
    """Return the files that signatures of the folder of `index` have: ours, and OpenSSF's."""
    return index.with_name(index.name + SIGNATURE_SUFFIX), index.with_name(OMS_SIGNATURE)


def left_out_of_signatures(index: Path) -> tuple[str, ...]:
    """Return the names that no signature covers, so that signing, or a tool, may add them later.

    Our own signature covers `index`, and with it every listed file; OpenSSF's covers every file in
    the folder but these: signatures of either kind, what a killed `sign` left, and `TOLERATED`.
    """
    signatures = [file.name for file in signature_files(index)]
    return (*signatures, *(f"{name}.tmp" for name in (index.name, *signatures)), *TOLERATED)


def hash_file(path: Path) -> str:
    """Return the sha256 of the file `path`, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_listing(file: Path, format_version: int) -> dict[str, Any]:
    """Read a JSON file that lists all files beside it with size and sha256, and check it.

    Raises `PackageError`, also for a format newer than `format_version`.
    """
    content = read_package_json(file.parent, file.name, max_bytes=_MAX_BYTES)
    if content is None:
        if (file.parent / "bundle.json").is_file():
            raise PackageError(
                f"{file.parent} is a bundle, not a package: pass the package that it was made from."
            )
        raise PackageError(f"{file.parent} is not a llama-onnx package: it has no {file.name}.")
    _check_listing(content, file, format_version)
    return content


def check_present(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `PackageError` unless all `files` are regular files in `folder` of the listed size."""
    for name, entry in files.items():
        path = file_inside(folder, name, PackageError)
        if path is None:
            raise PackageError(f"{folder} is incomplete: {name} is missing.")
        size, expected = path.stat().st_size, entry["size"]
        if size != expected:
            raise PackageError(f"{path} is damaged: it has {size:,} bytes instead of {expected:,}.")


def altered_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Read all `files` in `folder` and return the names of those whose sha256 differs."""
    return [name for name in files if not _is_intact(folder, name, files[name]["sha256"])]


def find_unlisted(index: Path, listed: Collection[str], beside: Collection[str] = ()) -> Unlisted:
    """Return what is in the folder of `index`, or below, and not `listed`.

    That is files, links, devices, and folders that hold no listed file; their names end with "/".
    `index`, its signature and the names in `beside` are left out.
    """
    ours = {*listed, index.name}
    ours_signature, _ = signature_files(index)
    allowed = {*beside, ours_signature.name}
    left = {*left_out_of_signatures(index)} - allowed
    folders = {parent for name in listed for parent in _parents(name)}
    unknown: list[str] = []
    tolerated: list[str] = []
    for name in sorted(_walk(index.parent, "", folders)):
        if name in ours or (name in allowed and _is_plain(index.parent, name)):
            continue
        plain = name in left and _is_plain(index.parent, name)
        (tolerated if plain else unknown).append(name)
    return Unlisted(tuple(unknown), tuple(tolerated))


def _walk(root: Path, below: str, folders: Collection[str]) -> Iterator[str]:
    """Yield the names of all entries below `root`/`below`; of other `folders`, only their own."""
    entered = 0
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = below + entry.name
            if not entry.is_dir(follow_symlinks=False):
                yield name
            elif name in folders:
                yield from _walk(root, f"{name}/", folders)
            elif name == ".cache":
                yield from _look_into(root, name)
            else:
                yield f"{name}/"
            entered += 1
            if entered > MAX_FILES:
                raise PackageError(f"{root / below} has more than {MAX_FILES:,} entries.")


def _look_into(root: Path, name: str) -> Iterator[str]:
    # A download to a folder leaves .cache/huggingface/, and nothing else in .cache.
    for inner in (root / name).iterdir():
        if inner.name == "huggingface" and inner.is_dir() and not inner.is_symlink():
            yield f"{name}/{inner.name}/"
        else:
            yield f"{name}/{inner.name}"


def _is_plain(folder: Path, name: str) -> bool:
    """Whether it is a folder, for a name that ends with "/", or a regular file: no link out."""
    if name.endswith("/"):
        return True
    try:
        return file_inside(folder, name, PackageError) is not None
    except PackageError:
        return False


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name


def _check_listing(content: dict[str, Any], file: Path, format_version: int) -> None:
    version = content.get("format_version")
    if version is None and "components" in content:
        raise PackageError(
            f"{file.parent} is a model package of ONNX Runtime, with variants for several targets: "
            f"take one out with `llama-onnx model-package extract {file.parent} OUT --target cpu`."
        )
    if not isinstance(version, int) or version < 1:
        raise PackageError(f"{file} is damaged: it has no format_version.")
    if version > format_version:
        raise PackageError(
            f"{file.parent} has package format {version}, but this llama-onnx reads format "
            f"{format_version} at most: upgrade llama-onnx."
        )
    files = content.get("files")
    if not isinstance(files, dict):
        raise PackageError(f"{file} is damaged: 'files' is missing or has the wrong type.")
    if len(files) > MAX_FILES:
        raise PackageError(f"{file} is damaged: it names more than {MAX_FILES:,} files.")
    for name, entry in files.items():
        if not (is_plain_name(name) and _is_entry(entry)):
            raise PackageError(f"{file} is damaged: its entry for {name!r} is invalid.")
    _check_case(files, file)


def _check_case(files: Collection[str], file: Path) -> None:
    seen: dict[str, str] = {}
    for name in files:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise PackageError(
                f"{file} is damaged: {other} and {name} are one file on Windows and macOS."
            )


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    size, sha256 = entry.get("size"), entry.get("sha256")
    sized = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    return sized and isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= _HEX


_HEX = frozenset("0123456789abcdef")


def _is_intact(folder: Path, name: str, sha256: str) -> bool:
    try:
        path = file_inside(folder, name, PackageError)
        return path is not None and hash_file(path) == sha256
    except (OSError, PackageError):
        return False
