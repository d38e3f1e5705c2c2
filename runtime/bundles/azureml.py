"""Bundle a package for a managed online endpoint of Azure Machine Learning.

OUT/
  package/                                the model
  code/                                   score.py, and the part of llama_onnx/ that it runs
  endpoint.yml  deployment.yml  environment.yml  conda.yml  requirements.txt
  request.json  README.md  bundle.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llama_onnx.runtime.bundles.clouds import (
    REQUEST,
    Machine,
    check_cpu,
    choose_machine,
    copy_runtime,
    describe_package,
    licence_files,
    requirements,
    service_name,
    write_requirements,
)
from llama_onnx.runtime.bundles.make import copy_package
from llama_onnx.runtime.bundles.place import Place
from llama_onnx.runtime.bundles.template_files import copy_template, fill_template, write_text
from llama_onnx.targets.package import ModelPackage

MACHINES = (
    Machine("Standard_DS3_v2", 14),
    Machine("Standard_DS4_v2", 28),
    Machine("Standard_DS5_v2", 56),
    Machine("Standard_E16s_v3", 128),
    Machine("Standard_E32s_v3", 256),
)

_FILLED = ("endpoint.yml", "deployment.yml", "environment.yml", "conda.yml", "README.md")


@dataclass(frozen=True)
class AzureML(Place):
    """A managed online endpoint, named after the bundle, in characters that Azure allows."""

    name: ClassVar[str] = "azureml"
    summary: ClassVar[str] = "a managed online endpoint of Azure Machine Learning"

    def check(self, package: ModelPackage) -> None:
        """Raise `PackageError` for a package that is not for the CPU."""
        check_cpu(package, self.name)

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the package, the scoring script and the definitions of what Azure creates."""
        need = choose_machine(package, MACHINES)
        values = {
            "name": service_name(name),
            "model": describe_package(package),
            "memory": need.reason,
            "instance": need.machine.name,
            "licences": licence_files(package),
            "requirements": "\n".join(f"      - {line}" for line in requirements(self.name)),
        }
        copy_package(package, folder / "package")
        copy_template(self.name, "score.py", folder / "code")
        copy_runtime(folder / "code")
        for file in _FILLED:
            fill_template(self.name, file, folder, values)
        write_requirements(self.name, folder / "requirements.txt")
        write_text(folder / "request.json", REQUEST)
        return need.warnings
