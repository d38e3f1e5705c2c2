"""A package made ready for a real-time endpoint of Amazon SageMaker.

OUT/
  model.tar.gz                            the model, for /opt/ml/model
  container/                              Dockerfile, serve.py and llama_onnx/, the part it runs
  deploy.py                               the calls that create the endpoint
  request.json  README.md  bundle.json
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path
from typing import IO

from llama_onnx.runtime.bundles.clouds import (
    REQUEST,
    Machine,
    check_cpu,
    choose_machine,
    copy_runtime,
    licence_files,
    service_name,
    what,
    write_requirements,
)
from llama_onnx.runtime.bundles.make import Bundled, make_bundle
from llama_onnx.runtime.bundles.template_files import copy_template, fill_template, write_text
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import MANIFEST, SIGNATURE_SUFFIX, ModelPackage
from llama_onnx.targets.signature import Signer

PLACE = "sagemaker"

MACHINES = (
    Machine("ml.m5.xlarge", 16),
    Machine("ml.m5.2xlarge", 32),
    Machine("ml.m5.4xlarge", 64),
    Machine("ml.m5.12xlarge", 192),
    Machine("ml.m5.24xlarge", 384),
)


def bundle_sagemaker(
    package: ModelPackage,
    out: Path,
    *,
    licensed: bool = False,
    force: bool = False,
    as_zip: bool = False,
    sign: Signer | None = None,
) -> Bundled:
    """Make the folder `out` of `package`; raises and promises what `make_bundle` does.

    The endpoint is called after the folder, as far as AWS's rules for names allow.
    """
    check_cpu(package, PLACE)
    need = choose_machine(package, MACHINES)
    values = {"name": service_name(out), "instance": need.machine.name}
    said = {"model": what(package), "memory": need.reason, "licences": licence_files(package)}

    def fill(folder: Path) -> tuple[str, ...]:
        write_model_archive(package, folder / "model.tar.gz")
        container = folder / "container"
        copy_template(PLACE, "Dockerfile", container)
        copy_template(PLACE, "serve.py", container)
        write_requirements(PLACE, container / "requirements.txt")
        copy_runtime(container)
        fill_template(PLACE, "deploy.py", folder, values)
        fill_template(PLACE, "README.md", folder, values | said)
        write_text(folder / "request.json", REQUEST)
        return ()

    return make_bundle(
        package, out, PLACE, fill, licensed=licensed, force=force, as_zip=as_zip, sign=sign
    )


def write_model_archive(package: ModelPackage, file: Path) -> None:
    """Pack the files of `package` into the tar file `file`; the same package, the same bytes.

    Raises `PackageError` if a file is not what the manifest says.
    """
    with (
        file.open("wb") as raw,
        # Weights hardly get smaller, so the fastest level; no name and no time in the header.
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, entry in sorted(package.manifest["files"].items()):
            if _add(archive, package.path / name, name) != entry["sha256"]:
                raise PackageError(f"{package.path} is damaged: {name} is not what was exported.")
        for name in (MANIFEST, MANIFEST + SIGNATURE_SUFFIX):
            if (package.path / name).is_file():
                _add(archive, package.path / name, name)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> str:
    """Add a file to the archive; returns the sha256 of what went in."""
    entry = tarfile.TarInfo(name)
    entry.size = path.stat().st_size
    with path.open("rb") as file:
        reader = _HashingReader(file)
        archive.addfile(entry, reader)
    return reader.digest.hexdigest()


class _HashingReader(io.RawIOBase):
    """Passes a file on and hashes it: what was packed is what has to be right."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        data = self._file.read(size)
        self.digest.update(data)
        return data
