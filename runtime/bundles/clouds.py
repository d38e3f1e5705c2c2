"""Shared by the bundles for clouds: the container, example requests, names, machines."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.runtime.bundles.markdown import as_code
from llama_onnx.runtime.bundles.runtime_copy import copy_runtime
from llama_onnx.runtime.bundles.template_files import copy_template, template_path
from llama_onnx.runtime.llama.template import has_template, template_text
from llama_onnx.targets import cpu
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.licences import TERMS, of_kind
from llama_onnx.targets.package import ModelPackage

_TEMPLATES = "cloud"
_CONTAINER = ("Dockerfile", "requirements.txt", "serve.py")

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


def chat_template(package: ModelPackage, place: str) -> str:
    """Return the text of the package's chat template.

    Raises `PackageError` for a package without one, and for one that is not UTF-8 text.
    """
    text = template_text(package.path)
    if not text:
        raise PackageError(
            f"{package.path} has no chat template, but a bundle for {place} chats: add the "
            "template to the checkpoint and export it again."
        )
    return text


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


@dataclass(frozen=True)
class Example:
    """A request that the package can answer, as JSON, and the path of OpenAI's API for it."""

    path: str
    request: str


def example(package: ModelPackage, model: str | None = None) -> Example:
    """Return a chat for a package with a chat template, otherwise a prompt to continue.

    /invocations needs no `model`.
    """
    text = "Once upon a time"
    asked: dict[str, Any] = {} if model is None else {"model": model}
    if has_template(package.path):
        path = "/v1/chat/completions"
        asked["messages"] = [{"role": "user", "content": text}]
    else:
        path, asked["prompt"] = "/v1/completions", text
    asked["max_tokens"] = 32
    return Example(path, json.dumps(asked) + "\n")


def requirements() -> tuple[str, ...]:
    """Return the pinned requirements of the container, one a line."""
    return tuple(template_path(_TEMPLATES, "requirements.txt").read_text("utf-8").splitlines())


def write_container(folder: Path) -> None:
    """Write what the image is built from: the same for each cloud and each package."""
    for name in _CONTAINER:
        copy_template(_TEMPLATES, name, folder)
    copy_runtime(template_path(_TEMPLATES, "serve.py"), folder)


def licence_files(package: ModelPackage) -> str:
    """Return the names of the package's license files, as part of a sentence."""
    names = of_kind(package.files, *TERMS)
    return ", ".join(map(as_code, names)) or "none came with it"


def describe_package(package: ModelPackage) -> str:
    """Return the source and precision of `package`, as part of a sentence."""
    source = as_code(package.manifest["source"].get("name", "a model"))
    return f"{source}, {as_code(package.precision)}, by ONNX Runtime on the CPU"
