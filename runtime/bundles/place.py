"""A place that bundles are made for. To add one, add a file and a line in places.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from llama_onnx.targets.package import ModelPackage


@dataclass(frozen=True)
class Option:
    """A command-line option that only some places take.

    Its value is a `bool` for a flag, otherwise the `Path` of an existing file or folder.
    """

    name: str
    kind: Literal["flag", "file", "folder"]
    help: str

    @property
    def flag(self) -> str:
        """The option as people write it.

        >>> Option("cpu_only", "flag", "Leave DirectML out.").flag
        '--cpu-only'
        """
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Place(ABC):
    """A place that a bundle is made for. A subclass has the place's settings as its fields.

    `name` is the value of `--for`, `summary` describes the bundle, `options` are the settings that
    the command line offers. `cpu_packages`: it takes packages for the CPU only.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[tuple[Option, ...]] = ()
    cpu_packages: ClassVar[bool] = False

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Place:
        """Return the place with settings from the command line; `given` is option name -> value.

        Options that were not given are absent. Raises `UsageError`.
        """
        return cls(**given)

    def check(self, package: ModelPackage) -> None:
        """Raise `PackageError` if `package` cannot run in this place."""
        return

    def content(self) -> Mapping[str, Any]:
        """Return entries for bundle.json that only bundles for this place have."""
        return {}

    @abstractmethod
    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the bundle called `name` to the empty `folder` and return warnings.

        bundle.json is written afterwards. Raises any `LlamaOnnxError`; the folder is then removed.
        """
