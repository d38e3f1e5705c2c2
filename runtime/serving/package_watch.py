"""Whether a package is still the one that was opened."""

from __future__ import annotations

from llama_onnx.runtime.serving.openai_errors import NotReadyError
from llama_onnx.targets.package import MANIFEST, ModelPackage


class PackageWatch:
    """Remembers the files of an open package: their size, time of change and place on the disk."""

    def __init__(self, package: ModelPackage) -> None:
        self._package = package
        self._names = (MANIFEST, *package.manifest["files"])
        self._seen = [self._look(name) for name in self._names]

    def check(self) -> None:
        """Raise `NotReadyError` if a file has changed or is gone."""
        for name, seen in zip(self._names, self._seen, strict=True):
            if self._look(name) != seen:
                raise NotReadyError(
                    f"{self._package.path / name} has changed since the package was opened: "
                    "restart the server."
                )

    def _look(self, name: str) -> tuple[int, int, int] | None:
        try:
            found = (self._package.path / name).stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino
