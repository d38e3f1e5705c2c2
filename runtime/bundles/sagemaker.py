"""Bundle a package for a real-time endpoint of Amazon SageMaker.

OUT/
  model.tar.gz                            the model, for /opt/ml/model
  container/                              Dockerfile, serve.py, and the part of llama_onnx/ it runs
  deploy.py                               the calls that create the endpoint
  request.json  README.md  bundle.json
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from llama_onnx.runtime.bundles.clouds import (
    Machine,
    check_cpu,
    choose_machine,
    describe_package,
    example,
    licence_files,
    service_name,
    write_container,
)
from llama_onnx.runtime.bundles.place import Place
from llama_onnx.runtime.bundles.template_files import fill_template, write_text
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.listing import SIGNATURE_SUFFIX
from llama_onnx.targets.package import MANIFEST, ModelPackage

MACHINES = (
    Machine("ml.m5.xlarge", 16),
    Machine("ml.m5.2xlarge", 32),
    Machine("ml.m5.4xlarge", 64),
    Machine("ml.m5.12xlarge", 192),
    Machine("ml.m5.24xlarge", 384),
)


@dataclass(frozen=True)
class SageMaker(Place):
    """A real-time endpoint, named after the bundle, in characters that AWS allows."""

    name: ClassVar[str] = "sagemaker"
    summary: ClassVar[str] = "a container for Amazon SageMaker, and the calls that deploy it"
    cpu_packages: ClassVar[bool] = True

    def check(self, package: ModelPackage) -> None:
        """Raise `PackageError` for a package that is not for the CPU."""
        check_cpu(package, self.name)

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the model's archive, the container's sources and the deployment script."""
        need = choose_machine(package, MACHINES)
        values = {"name": service_name(name), "instance": need.machine.name}
        details = {
            "model": describe_package(package),
            "memory": need.reason,
            "licences": licence_files(package),
        }
        write_model_archive(package, folder / "model.tar.gz")
        write_container(folder / "container")
        fill_template(self.name, "deploy.py", folder, values)
        fill_template(self.name, "README.md", folder, values | details)
        write_text(folder / "request.json", example(package).request)
        return need.warnings


def write_model_archive(package: ModelPackage, file: Path) -> None:
    """Pack the files of `package` into the archive `file`; equal packages give equal bytes.

    Raises `PackageError` if a file differs from the manifest.
    """
    with (
        file.open("wb") as raw,
        # Weights hardly compress: use the fastest level. The header holds neither name nor time.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, entry in sorted(package.manifest["files"].items()):
            if _add(archive, package.path / name, name) != entry["sha256"]:
                raise PackageError(
                    f"{package.path} is damaged: {name} has changed since the export."
                )
        for name in (MANIFEST, MANIFEST + SIGNATURE_SUFFIX):
            if found := file_inside(package.path, name, PackageError):
                _add(archive, found, name)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> str:
    """Add a file to the archive and return the sha256 of the bytes that were packed."""
    entry = tarfile.TarInfo(name)
    entry.size = path.stat().st_size
    with path.open("rb") as file:
        reader = _HashingReader(file)
        archive.addfile(entry, reader)
    return reader.digest.hexdigest()


class _HashingReader(io.RawIOBase):
    """Hash a file while it is read, so that the check covers the bytes that are packed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        data = self._file.read(size)
        self.digest.update(data)
        return data
