"""A package made ready for a managed online endpoint of Azure Machine Learning.

OUT/
  package/                                the model
  code/                                   score.py and llama_onnx/, the part of it that it runs
  endpoint.yml  deployment.yml  environment.yml  conda.yml  requirements.txt
  request.json  README.md  bundle.json
"""

from __future__ import annotations

from pathlib import Path

from llama_onnx.runtime.bundles.clouds import (
    REQUEST,
    Machine,
    check_cpu,
    choose_machine,
    copy_runtime,
    licence_files,
    requirements,
    service_name,
    what,
    write_requirements,
)
from llama_onnx.runtime.bundles.make import Bundled, copy_package, make_bundle
from llama_onnx.runtime.bundles.template_files import copy_template, fill_template, write_text
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.signature import Signer

PLACE = "azureml"

MACHINES = (
    Machine("Standard_DS3_v2", 14),
    Machine("Standard_DS4_v2", 28),
    Machine("Standard_DS5_v2", 56),
    Machine("Standard_E16s_v3", 128),
    Machine("Standard_E32s_v3", 256),
)


def bundle_azureml(
    package: ModelPackage,
    out: Path,
    *,
    licensed: bool = False,
    force: bool = False,
    as_zip: bool = False,
    sign: Signer | None = None,
) -> Bundled:
    """Make the folder `out` of `package`; raises and promises what `make_bundle` does.

    The endpoint is called after the folder, as far as Azure's rules for names allow.
    """
    check_cpu(package, PLACE)
    need = choose_machine(package, MACHINES)
    values = {
        "name": service_name(out),
        "model": what(package),
        "memory": need.reason,
        "instance": need.machine.name,
        "licences": licence_files(package),
        "requirements": "\n".join(f"      - {line}" for line in requirements(PLACE)),
    }

    def fill(folder: Path) -> tuple[str, ...]:
        copy_package(package, folder / "package")
        copy_template(PLACE, "score.py", folder / "code")
        copy_runtime(folder / "code")
        for name in ("endpoint.yml", "deployment.yml", "environment.yml", "conda.yml", "README.md"):
            fill_template(PLACE, name, folder, values)
        write_requirements(PLACE, folder / "requirements.txt")
        write_text(folder / "request.json", REQUEST)
        return ()

    return make_bundle(
        package, out, PLACE, fill, licensed=licensed, force=force, as_zip=as_zip, sign=sign
    )
