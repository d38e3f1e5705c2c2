"""Bundle a package for Foundry Local, which registers a folder where it is.

OUT/
  package/                                the model, with inference_model.json
  register.py                             registers it with foundry-local-sdk, and asks a question
  README.md  bundle.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llama_onnx.runtime.bundles.clouds import (
    chat_template,
    check_cpu,
    describe_package,
    licence_files,
    service_name,
)
from llama_onnx.runtime.bundles.make import copy_package
from llama_onnx.runtime.bundles.place import Place
from llama_onnx.runtime.bundles.template_files import fill_template, write_text
from llama_onnx.runtime.llama.template import read_template
from llama_onnx.targets.package import INFERENCE_MODEL, ModelPackage

_CONTENT = "{Content}"
"""Where Foundry Local puts a message."""

_TOOL_MARKS = ("<tool_call>", "</tool_call>")


@dataclass(frozen=True)
class Foundry(Place):
    """Foundry Local on the CPU; the model is named after the bundle."""

    name: ClassVar[str] = "foundry"
    summary: ClassVar[str] = "Foundry Local, with a script that registers the model"
    cpu_packages: ClassVar[bool] = True

    def check(self, package: ModelPackage) -> None:
        """Raise `PackageError` for a package that is not for the CPU, or that cannot chat."""
        check_cpu(package, self.name)
        chat_template(package, self.name)

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the package, its metadata and the script."""
        copy_package(package, folder / "package")
        model = f"{service_name(name)}-generic-cpu"
        template = chat_template(package, self.name)
        about = {"Name": model, "PromptTemplate": prompt_template(package.path)}
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "package" / INFERENCE_MODEL, text)
        start, end = _TOOL_MARKS if all(mark in template for mark in _TOOL_MARKS) else ("", "")
        fill_template(
            self.name, "register.py", folder, {"model": model, "start": start, "end": end}
        )
        values = {
            "title": name,
            "name": model,
            "model": describe_package(package),
            "licences": licence_files(package),
        }
        fill_template(self.name, "README.md", folder, values)
        return ()


def prompt_template(package: Path) -> dict[str, str]:
    """Return what the chat template in `package` writes for a message of each role, and for a first
    question up to its answer (`prompt`); "{Content}" is the message.

    A role is left out if the template refuses it, or does not write its messages one by one.
    """
    asked, answered = _render(package, "user"), _render(package, "user", "assistant")
    user = _render(package, "user", "assistant", "user").removeprefix(answered)
    parts = {
        "system": _before(_render(package, "system", "user"), user),
        "user": user,
        "assistant": answered.removeprefix(asked),
        "prompt": _render(package, "user", answer=True),
    }
    return {role: text for role, text in parts.items() if text.count(_CONTENT) == 1}


def _before(whole: str, end: str) -> str:
    return whole.removesuffix(end) if end and whole.endswith(end) else ""


def _render(package: Path, *roles: str, answer: bool = False) -> str:
    """Return the text for messages of these roles; with `answer`, up to the start of an answer.

    The text is empty if the template refuses them.
    """
    # Imported here because it needs jinja2, which `bundle --help` does not.
    from llama_onnx.runtime.chat_template.render import RejectedError, TemplateError

    template = read_template(package)
    messages = [{"role": role, "content": _CONTENT} for role in roles]
    try:
        return template.render(messages, add_generation_prompt=answer) if template else ""
    except (RejectedError, TemplateError):
        return ""
