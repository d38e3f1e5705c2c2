"""A package made ready for the Hugging Face hub: `huggingface_hub.upload_folder` takes it as it is.

OUT/
  README.md  .gitattributes               the model card, and what is stored as large files
  model.onnx ...                          the package's own files
  bundle.json
"""

from __future__ import annotations

from pathlib import Path

from llama_onnx.runtime.bundles.card import missing, write_card
from llama_onnx.runtime.bundles.clouds import service_name
from llama_onnx.runtime.bundles.make import Bundled, certificate_of, copy_package, make_bundle
from llama_onnx.runtime.bundles.template_files import copy_template, write_text
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.signature import Signer

PLACE = "hub"


def bundle_hub(
    package: ModelPackage,
    out: Path,
    *,
    licensed: bool = False,
    force: bool = False,
    as_zip: bool = False,
    sign: Signer | None = None,
) -> Bundled:
    """Make the folder `out` of `package`; raises and promises what `make_bundle` does.

    Raises `PackageError` also for a certificate that is about other files.
    """

    def fill(folder: Path) -> tuple[str, ...]:
        copy_package(package, folder)
        # Of what was copied and found intact.
        copied = ModelPackage(folder, package.manifest)
        certificate = certificate_of(copied)
        card = write_card(copied, certificate, out.name, service_name(out))
        write_text(folder / "README.md", card)
        copy_template(PLACE, ".gitattributes", folder)
        return tuple(missing(copied, certificate))

    return make_bundle(
        package, out, PLACE, fill, licensed=licensed, force=force, as_zip=as_zip, sign=sign
    )
