"""What the bundles for clouds share: templates, the runtime's source, names, machines.

llama-onnx is not on PyPI, so a bundle brings the part of it that runs there, as source.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template

from llama_onnx.targets import cpu
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.licences import TERMS, of_kind
from llama_onnx.targets.package import ModelPackage

TEMPLATES = Path(__file__).parent / "templates"
REQUEST = '{"prompt": "Once upon a time", "max_new_tokens": 32}\n'
"""An example request."""

_LEFT_OUT = ("__pycache__", "bundles", "commands", "doctor", "kernels", "native", "*.typed")
_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """An instance type, and its memory in GiB."""

    name: str
    memory: int


@dataclass(frozen=True)
class Need:
    """The machine for a package, and why."""

    machine: Machine
    reason: str


def check_cpu(package: ModelPackage, place: str) -> None:
    """Raise `PackageError` for a package that was made for another target than the CPU, and
    `UsageError` for one that does not take text."""
    package.require_tokenizer()
    if package.target != cpu.TARGET.name:
        raise PackageError(
            f"{package.path} was made for {package.target}, and the bundle for {place} runs on the "
            "CPU alone: export it with --target cpu."
        )


def choose_machine(package: ModelPackage, machines: Sequence[Machine]) -> Need:
    """The smallest of `machines`, in order, that holds `package`, or else the largest."""
    # ONNX Runtime maps the weights and keeps them once more, packed for its kernels.
    files = sum(entry["size"] for entry in package.manifest["files"].values())
    needed = 2 * files / _GIB + 2
    fitting = [machine for machine in machines if machine.memory >= needed]
    machine = fitting[0] if fitting else machines[-1]
    says = f"needs about {needed:.0f} GiB of memory, twice its weights and 2; {machine.name} has"
    return Need(machine, f"{says} {machine.memory}")


def service_name(out: Path) -> str:
    """A name that Azure and AWS take, from the name of the bundle's folder: 3 to 32 characters."""
    name = re.sub(r"[^a-z0-9]+", "-", out.name.lower()).strip("-")
    name = re.sub(r"^[^a-z]+", "", name)[:32].strip("-")
    return name if len(name) >= 3 else "llama-onnx"


def requirements(place: str) -> tuple[str, ...]:
    """The pinned requirements of a bundle for `place`."""
    files = (TEMPLATES / "cloud" / "requirements.txt", TEMPLATES / place / "requirements.txt")
    return tuple(line for file in files for line in file.read_text("utf-8").splitlines())


def write_requirements(place: str, file: Path) -> None:
    """Write the requirements of `place` to `file`, for pip."""
    write_text(file, "".join(f"{line}\n" for line in requirements(place)))


def fill_template(place: str, name: str, folder: Path, values: Mapping[str, str]) -> None:
    """Write the template `name` of `place` to `folder`, each $value replaced."""
    template = Template((TEMPLATES / place / name).read_text("utf-8"))
    write_text(folder / name, template.substitute(values))


def copy_template(place: str, name: str, folder: Path) -> None:
    """Copy the template `name` of `place` to `folder` as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TEMPLATES / place / name, folder / name)


def write_text(file: Path, text: str) -> None:
    """Write `text` with lines that end alike wherever the bundle is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())


def copy_runtime(folder: Path) -> None:
    """Copy to `folder`/llama_onnx what opens and runs a package, with its licence."""
    # Looked up by name: targets does not import runtime, it only ships it.
    for house in ("runtime", "targets"):
        spec = find_spec(f"llama_onnx.{house}")
        assert spec is not None and spec.submodule_search_locations
        source = Path(spec.submodule_search_locations[0])
        ignored = shutil.ignore_patterns(*_LEFT_OUT)
        shutil.copytree(source, folder / "llama_onnx" / house, ignore=ignored)
    licence = Path(__file__).parents[1] / "native" / "LICENSE"
    shutil.copyfile(licence, folder / "llama_onnx" / "LICENSE")


def licence_files(package: ModelPackage) -> str:
    """The package's licence files, for a sentence."""
    names = of_kind(package.files, *TERMS)
    return ", ".join(f"`{name}`" for name in names) or "none came with it"


def what(package: ModelPackage) -> str:
    """The package in a few words."""
    source = str(package.manifest["source"].get("name", "a model"))
    return f"{source}, {package.precision}, by ONNX Runtime on the CPU"
