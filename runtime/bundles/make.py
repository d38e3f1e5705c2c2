"""Make a bundle: check licenses, fill a folder for a place, and rename it when it is complete."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.runtime.bundles.bom import make_bom
from llama_onnx.runtime.bundles.place import Place
from llama_onnx.targets.bundle import BUNDLE, list_files, write_bundle
from llama_onnx.targets.durable import flush, flush_tree, is_full
from llama_onnx.targets.errors import PackageError, ResourceError, UsageError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.licences import (
    file_start,
    llama_generation,
    of_kind,
    required_kinds,
)
from llama_onnx.targets.listing import SIGNATURE_SUFFIX
from llama_onnx.targets.lock import locked
from llama_onnx.targets.package import (
    BOM,
    MANIFEST,
    PARTIAL_SUFFIX,
    ModelPackage,
)
from llama_onnx.targets.signature import Signer

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.certificate import Certificate


@dataclass(frozen=True)
class Settings:
    """How to make a bundle; these settings apply to every place.

    `licensed`: accept a package without the license files that must accompany its model. `force`:
    replace an older bundle. `as_zip`: also pack the bundle into OUT.zip. `sign`: sign bundle.json.
    `bom`: write a bill of materials.
    """

    licensed: bool = False
    force: bool = False
    as_zip: bool = False
    sign: Signer | None = None
    bom: bool = False


_LOCK_SUFFIX = ".bundle.lock"

DEFAULTS = Settings()


@dataclass(frozen=True)
class Bundled:
    """A finished bundle: its folder, its zip file if there is one, and warnings for the user."""

    path: Path
    zip: Path | None
    warnings: tuple[str, ...]


def make_bundle(
    package: ModelPackage, out: Path, place: Place, settings: Settings = DEFAULTS
) -> Bundled:
    """Make `package` ready for `place` in the new folder `out`.

    Raises `PackageError` for a damaged package, one that cannot run there and one that lacks its
    license files, `UsageError` if `out` exists, and what `place.fill` raises; no bundle is then
    written.
    """
    _check_apart(package.path, out)
    place.check(package)
    if not settings.licensed:
        check_licences(package)
    left = tuple(
        f"{path} was left by a bundle that was killed: it is removed." for path in _left_over(out)
    )
    with new_folder(out, force=settings.force) as folder:
        warnings = place.fill(package, folder, out.name)
        if settings.bom:
            (folder / BOM).write_text(make_bom(package, certificate_of(package)), "utf-8")
        content = {**_describe(package, place.name), **place.content()}
        write_bundle(folder, content, settings.sign)
    packed = out.with_name(out.name + ".zip") if settings.as_zip else None
    if packed:
        write_zip(out, packed)
    return Bundled(out, packed, (*left, *warnings))


def check_licences(package: ModelPackage) -> None:
    """Raise `PackageError` for a package without the license files that must accompany its model.

    These are a license for every model, and for Meta's Llama the use policy too.
    """
    name = str(package.manifest["source"].get("name", ""))
    generation = llama_generation(name, [package.path / file for file in package.files])
    missing = [
        f"{kind} ({file_start(kind)})"
        for kind in required_kinds(generation)
        if not of_kind(package.files, kind)
    ]
    if missing:
        raise PackageError(
            f"{package.path} lacks the {' and the '.join(missing)} that must accompany the model: "
            "export it from a source that has them, or pass --i-have-the-licence if you may "
            "distribute it without them."
        )


def certificate_of(package: ModelPackage) -> Certificate | None:
    """Return the package's certificate, or None if it has none.

    Raises `PackageError` for a certificate that is damaged or was made for other files.
    """
    # Imported here because it needs numpy, which `bundle --help` does not.
    from llama_onnx.runtime.measure import certificate as certificates

    name = f"{certificates.FOLDER}/{certificates.CERTIFICATE}"
    if name not in package.files:
        return None
    certificate = certificates.read_certificate(package.path)
    if stale := certificates.stale_files(certificate, package):
        raise PackageError(
            f"{package.path / name} was made for a different {', '.join(stale)}: make a new one "
            "with `llama-onnx validate --certify`."
        )
    return certificate


def copy_package(package: ModelPackage, folder: Path) -> None:
    """Copy the files of `package` to `folder`, manifest and signature included.

    Raises `PackageError` if a file differs from the manifest.
    """
    for name in (*package.manifest["files"], MANIFEST, MANIFEST + SIGNATURE_SUFFIX):
        source, target = file_inside(package.path, name, PackageError), folder / name
        if source is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    # The copy is checked, not the original, which may change in the meantime.
    damaged = ModelPackage(folder, package.manifest).verify()
    if damaged:
        raise PackageError(f"{package.path} is damaged: {damaged[0]} has changed since the export.")


@contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `out` after the block, or removed if that fails.

    What a killed process left is removed first. Raises `UsageError` if `out` exists, unless it is a
    bundle and `force` is true, and if another process is making it; `ResourceError` if the disk
    fails.
    """
    _check_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _partial(out), out.with_name(out.name + _LOCK_SUFFIX)
    with _disk_errors(out), locked(lock, f"another bundle is written to {out}: wait for it."):
        try:
            for left in _left_over(out):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            folder.mkdir()
            yield folder
            _check_free(out, force)
            flush_tree(folder)
            if out.exists():
                shutil.rmtree(out)
            folder.rename(out)
            flush(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if sys.platform != "win32":  # there nobody can remove an open file
                lock.unlink(missing_ok=True)


def write_zip(folder: Path, out: Path) -> None:
    """Pack `folder`, as a folder of that name, into the zip file `out`."""
    temporary = out.with_name(out.name + PARTIAL_SUFFIX)
    try:
        with _disk_errors(out), zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in list_files(folder):
                # Weights do not compress.
                packed = path.suffix in (".data", ".gz") or path.suffix.startswith(".onnx_data")
                stored = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
                archive.write(path, f"{folder.name}/{name}", compress_type=stored)
        flush(temporary)
        temporary.replace(out)
        flush(out.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.bundle{PARTIAL_SUFFIX}")


def _left_over(out: Path) -> list[Path]:
    """Return what a killed process left beside `out`."""
    archive = out.with_name(f"{out.name}.zip{PARTIAL_SUFFIX}")
    return [path for path in (_partial(out), archive) if path.exists()]


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn an error of the disk into `ResourceError`."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise ResourceError(
                f"the disk is full: free some space, then repeat the call; {out} was not written."
            ) from error
        what = f"{error.filename or out}: {error.strerror or error}"
        raise ResourceError(f"{what}; {out} was not written.") from error


def _check_apart(package: Path, out: Path) -> None:
    """Raise `UsageError` for a bundle in its own package, or around it."""
    source, target = Path(os.path.realpath(package)), Path(os.path.realpath(out))
    if target.is_relative_to(source):
        raise UsageError(f"{out} is inside the package {package}: choose another place.")
    if source.is_relative_to(target):
        raise UsageError(f"{out} holds the package {package}: choose another place.")


def _describe(package: ModelPackage, place: str) -> dict[str, Any]:
    source = package.manifest["source"]
    return {
        "for": place,
        "created_with": {"llama-onnx": version("llama-onnx")},
        "package": {
            "name": package.path.resolve().name,
            "target": package.target,
            "precision": package.precision,
            "source": {key: source[key] for key in ("name", "commit") if key in source},
        },
    }


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise UsageError(f"{out} exists already: choose another name or pass --force.")
    if not (out / BUNDLE).is_file():
        raise UsageError(
            f"{out} is not a bundle, so --force does not replace it: remove it yourself."
        )
