"""Bundle a package for a managed online endpoint of Azure Machine Learning.

OUT/
  package/                                the model
  container/                              Dockerfile, serve.py, and the part of llama_onnx/ it runs
  endpoint.yml  deployment.yml  environment.yml
  request.json  README.md  bundle.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
from llama_onnx.runtime.bundles.make import copy_package
from llama_onnx.runtime.bundles.place import Place
from llama_onnx.runtime.bundles.template_files import fill_template, write_text
from llama_onnx.targets.package import ModelPackage

MACHINES = (
    Machine("Standard_DS3_v2", 14),
    Machine("Standard_DS4_v2", 28),
    Machine("Standard_DS5_v2", 56),
    Machine("Standard_E16s_v3", 128),
    Machine("Standard_E32s_v3", 256),
)

_FILLED = ("endpoint.yml", "deployment.yml", "environment.yml", "README.md")


@dataclass(frozen=True)
class AzureML(Place):
    """A managed online endpoint, named after the bundle, in characters that Azure allows."""

    name: ClassVar[str] = "azureml"
    summary: ClassVar[str] = "a managed online endpoint of Azure Machine Learning"
    cpu_packages: ClassVar[bool] = True

    def check(self, package: ModelPackage) -> None:
        """Raise `PackageError` for a package that is not for the CPU."""
        check_cpu(package, self.name)

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the package, the container's sources and the definitions of what Azure creates."""
        need = choose_machine(package, MACHINES)
        service = service_name(name)
        asked = example(package, service)
        values = {
            "name": service,
            "model": describe_package(package),
            "memory": need.reason,
            "instance": need.machine.name,
            "licences": licence_files(package),
            "path": asked.path,
        }
        copy_package(package, folder / "package")
        write_container(folder / "container")
        for file in _FILLED:
            fill_template(self.name, file, folder, values)
        write_text(folder / "request.json", asked.request)
        return need.warnings
