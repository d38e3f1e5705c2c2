"""Shared by the bundles for clouds: the runtime's source, requirements, names, machines."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_onnx.runtime.bundles.markdown import as_code
from llama_onnx.runtime.bundles.template_files import template_path, write_text
from llama_onnx.targets import cpu
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.licences import TERMS, of_kind
from llama_onnx.targets.package import ModelPackage

REQUEST = '{"prompt": "Once upon a time", "max_new_tokens": 32}\n'
"""An example request."""

_LEFT_OUT = ("__pycache__", "bundles", "commands", "kernels", "native", "*.onnx", "*.typed")
_SOURCES = {"runtime": Path(__file__).parents[1], "targets": Path(cpu.__file__).parent}
"""The folders of this project that are needed to run a package."""

_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """An instance type, and its memory in GiB."""

    name: str
    memory: int


@dataclass(frozen=True)
class Need:
    """The machine chosen for a package, the reason in sentences, and warnings."""

    machine: Machine
    reason: str
    warnings: Sequence[str]


def check_cpu(package: ModelPackage, place: str) -> None:
    """Raise `PackageError` for a package whose target is not cpu, `UsageError` for one without a
    tokenizer."""
    package.require_tokenizer()
    if package.target != cpu.TARGET.name:
        raise PackageError(
            f"{package.path} was made for {package.target}, but a bundle for {place} runs on the "
            "CPU only: export the package with --target cpu."
        )


def choose_machine(package: ModelPackage, machines: Sequence[Machine]) -> Need:
    """Return the first of `machines`, sorted by memory, that has enough; if none has, the last.

    The reason says so then, and is a warning too.
    """
    # ONNX Runtime maps the weights and keeps a second copy, packed for its kernels.
    files = sum(entry["size"] for entry in package.manifest["files"].values())
    needed = 2 * files / _GIB + 2
    about = f"The model needs about {needed:.0f} GiB of memory, twice its size plus 2 GiB:"
    for machine in machines:
        if machine.memory >= needed:
            reason = (
                f"{about} {machine.name}, with {machine.memory} GiB, is the smallest type in our "
                "list that can hold it."
            )
            return Need(machine, reason, ())
    largest = machines[-1]
    reason = (
        f"{about} no type in our list can hold it. {largest.name}, the largest, has only "
        f"{largest.memory} GiB: choose another type."
    )
    return Need(largest, reason, (reason,))


def service_name(name: str) -> str:
    """Turn the name of a bundle into one that Azure and AWS accept: 3 to 32 characters.

    >>> service_name("Llama 2, 7B")
    'llama-2-7b'
    """
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    name = re.sub(r"^[^a-z]+", "", name)[:32].strip("-")
    return name if len(name) >= 3 else "llama-onnx"


def requirements(place: str) -> tuple[str, ...]:
    """Return the pinned requirements of a bundle for `place`, one a line."""
    files = [template_path(folder, "requirements.txt") for folder in ("cloud", place)]
    return tuple(line for file in files for line in file.read_text("utf-8").splitlines())


def write_requirements(place: str, file: Path) -> None:
    """Write the requirements of `place` to `file`, in pip's format."""
    write_text(file, "".join(f"{line}\n" for line in requirements(place)))


def copy_runtime(folder: Path) -> None:
    """Copy the part of llama-onnx that opens and runs a package to `folder`/llama_onnx.

    As source, with the license: llama-onnx is not on PyPI.
    """
    ignored = shutil.ignore_patterns(*_LEFT_OUT)
    for name, source in _SOURCES.items():
        shutil.copytree(source, folder / "llama_onnx" / name, ignore=ignored)
    # Not a namespace package: an installed llama_onnx must not take precedence over this one.
    write_text(folder / "llama_onnx" / "__init__.py", '"""The code that runs a package."""\n')
    shutil.copyfile(_SOURCES["runtime"] / "native" / "LICENSE", folder / "llama_onnx" / "LICENSE")


def licence_files(package: ModelPackage) -> str:
    """Return the names of the package's license files, as part of a sentence."""
    names = of_kind(package.files, *TERMS)
    return ", ".join(map(as_code, names)) or "none came with it"


def describe_package(package: ModelPackage) -> str:
    """Return the source and precision of `package`, as part of a sentence."""
    source = as_code(package.manifest["source"].get("name", "a model"))
    return f"{source}, {as_code(package.precision)}, by ONNX Runtime on the CPU"
