"""Put the figures of an evaluation into a package's certificate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_onnx.runtime.measure.certificate import (
    CERTIFICATE,
    FOLDER,
    read_certificate,
    stale_files,
)
from llama_onnx.runtime.measure.jsontext import dumps
from llama_onnx.targets.durable import replace_file
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage, check_changeable, renew_manifest


def check_recordable(path: Path) -> ModelPackage:
    """Return the package at `path`; raise `UsageError` unless it has a certificate that applies and
    can be changed, and `PackageError` if that is damaged."""
    package = ModelPackage.open(path)
    check_changeable(package)
    if stale := stale_files(read_certificate(path), package):
        raise UsageError(
            f"the certificate of {path} is for another {', '.join(stale)}: make a new one with "
            "`llama-onnx validate --certify` first."
        )
    return package


def record(package: ModelPackage, entries: Mapping[str, Any]) -> None:
    """Write `entries` into the certificate of `package`, in place of those of the same names."""
    content = {**read_certificate(package.path).content, **entries}
    file = package.path / FOLDER / CERTIFICATE
    replace_file(file, (dumps(content) + "\n").encode())
    renew_manifest(package, rewritten=[f"{FOLDER}/{CERTIFICATE}"])
