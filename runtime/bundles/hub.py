"""Bundle a package for the Hugging Face hub; `huggingface_hub.upload_folder` uploads the bundle.

OUT/
  README.md  .gitattributes               the model card, and which files Git LFS stores
  model.onnx ...                          the package's own files
  bundle.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llama_onnx.runtime.bundles.card import missing, write_card
from llama_onnx.runtime.bundles.clouds import service_name
from llama_onnx.runtime.bundles.make import certificate_of, copy_package
from llama_onnx.runtime.bundles.place import Place
from llama_onnx.runtime.bundles.template_files import copy_template, write_text
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage

_CARD = "README.md"


@dataclass(frozen=True)
class Hub(Place):
    """A model repository on the Hugging Face hub."""

    name: ClassVar[str] = "hub"
    summary: ClassVar[str] = "a repository for the Hugging Face hub, with a model card"

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the package and its card.

        Raises `PackageError` for a certificate that is damaged or was made for other files.
        """
        if _CARD in package.files:
            raise PackageError(
                f"{package.path} lists a {_CARD} of its own, which no export writes, and where the "
                "card goes: the package was altered."
            )
        copy_package(package, folder)
        # The card is written from the copy, whose hashes have been checked.
        copied = ModelPackage(folder, package.manifest)
        certificate = certificate_of(copied)
        card = write_card(copied, certificate, name, service_name(name))
        write_text(folder / _CARD, card)
        copy_template(self.name, ".gitattributes", folder)
        return tuple(missing(copied, certificate))
