"""What every bundle has in common: licences, hashes, a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.targets.bundle import BUNDLE, list_files, write_bundle
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.licences import (
    file_start,
    llama_generation,
    of_kind,
    required_kinds,
)
from llama_onnx.targets.package import (
    MANIFEST,
    PARTIAL_SUFFIX,
    SIGNATURE_SUFFIX,
    ModelPackage,
)
from llama_onnx.targets.signature import Signer

if TYPE_CHECKING:
    from llama_onnx.runtime.measure.certificate import Certificate


@dataclass(frozen=True)
class Bundled:
    """A finished bundle: its folder, its zip file if one was asked for, and what to know."""

    path: Path
    zip: Path | None
    warnings: tuple[str, ...]


def make_bundle(
    package: ModelPackage,
    out: Path,
    place: str,
    fill: Callable[[Path], Sequence[str]],
    *,
    content: Mapping[str, Any] | None = None,
    licensed: bool = False,
    force: bool = False,
    as_zip: bool = False,
    sign: Signer | None = None,
) -> Bundled:
    """Make the folder `out` of `package` for `place`: `fill` writes it and returns warnings.

    `content` is what bundle.json says besides. `licensed` says that the licence files a model has
    to be passed on with may be missing. `sign` makes the signature bundle.json.sig. Raises
    `PackageError` or `UsageError`, and then leaves nothing behind.
    """
    if not licensed:
        check_licences(package)
    with new_folder(out, force=force) as folder:
        warnings = fill(folder)
        write_bundle(folder, {**_describe(package, place), **(content or {})}, sign)
    packed = out.with_name(out.name + ".zip") if as_zip else None
    if packed:
        write_zip(out, packed)
    return Bundled(out, packed, tuple(warnings))


def check_licences(package: ModelPackage) -> None:
    """Raise `PackageError` for a package that lacks the licence files it must be passed on with.

    That is a licence for every model, and for Meta's Llama its use policy too.
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
            f"{package.path} has no {' and no '.join(missing)} to pass the model on with: export "
            "it from a source that has, or say --i-have-the-licence if you may do without."
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
            f"{package.path / name} was made for another {', '.join(stale)}: make a new one with "
            "`llama-onnx validate --certify`."
        )
    return certificate


def copy_package(package: ModelPackage, folder: Path) -> None:
    """Copy a package's files to `folder`, manifest and signature too.

    Raises `PackageError` if a file is not what the manifest says.
    """
    signature = MANIFEST + SIGNATURE_SUFFIX
    signed = [signature] if (package.path / signature).is_file() else []
    for name in (*package.manifest["files"], MANIFEST, *signed):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.path / name, target)
    # What was copied is what has to be right; the original may change in the meantime.
    damaged = ModelPackage(folder, package.manifest).verify()
    if damaged:
        raise PackageError(f"{package.path} is damaged: {damaged[0]} is not what was exported.")


@contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a folder that takes the name `out` when the block ends, and goes when it fails.

    Raises `UsageError` if `out` is there, unless `force` is given and it is a bundle of ours.
    """
    _check_free(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=PARTIAL_SUFFIX, dir=out.parent))
    folder.chmod(0o755)
    try:
        yield folder
        _check_free(out, force)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_zip(folder: Path, out: Path) -> None:
    """Pack `folder` into the zip file `out`, as one folder of the same name."""
    temporary = out.with_name(out.name + PARTIAL_SUFFIX)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in list_files(folder):
                # Weights do not get smaller, only slower.
                packed = path.suffix in (".data", ".gz")
                stored = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
                archive.write(path, f"{folder.name}/{name}", compress_type=stored)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _describe(package: ModelPackage, place: str) -> dict[str, Any]:
    return {
        "for": place,
        "created_with": {"llama-onnx": version("llama-onnx")},
        "package": {
            "name": package.path.resolve().name,
            "target": package.target,
            "precision": package.precision,
        },
    }


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise UsageError(f"{out} is there already: choose another name, or replace it by --force.")
    if not (out / BUNDLE).is_file():
        raise UsageError(f"{out} is no bundle, so --force does not replace it: remove it yourself.")
