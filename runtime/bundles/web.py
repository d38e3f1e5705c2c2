"""Bundle a package for transformers.js: a page that chats in the browser, and Node.

OUT/
  model/                                  transformers.js's layout, as on the Hugging Face hub
    onnx/model_q4.onnx  onnx/model_q4.onnx_data ...
    config.json  generation_config.json  tokenizer.json  tokenizer_config.json  licenses
  index.html  chat.js                     the page
  node.mjs                                ten lines for Node
  package.json  README.md  bundle.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llama_onnx.runtime.bundles.clouds import (
    chat_template,
    check_cpu,
    describe_package,
    licence_files,
)
from llama_onnx.runtime.bundles.place import Place
from llama_onnx.runtime.bundles.template_files import copy_template, fill_template, write_text
from llama_onnx.runtime.bundles.web_files import LIMIT, read_listed, write_graph
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.licences import PACKAGE_CARD, TERMS, of_kind
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.package_json import parse_package_json

_TYPES = {"int4": "q4", "int8": "q8", "fp32": "fp32", "fp16": "fp16"}
"""Precision -> transformers.js's `dtype`."""

_SUFFIXES = {"q4": "_q4", "q8": "_quantized", "fp32": "", "fp16": "_fp16"}
"""What transformers.js adds to `model` for a dtype."""

_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")

_WASM = 4_000_000_000
"""Memory that WebAssembly can address."""


@dataclass(frozen=True)
class Web(Place):
    """The browser (WebAssembly) and Node, by transformers.js. `limit`: bytes in a data file."""

    name: ClassVar[str] = "web"
    summary: ClassVar[str] = "transformers.js: a page for the browser, and Node"
    cpu_packages: ClassVar[bool] = True

    limit: int = LIMIT

    def check(self, package: ModelPackage) -> None:
        """Raise `PackageError` for a package that transformers.js cannot run, or that cannot chat.

        `UsageError` for one without a tokenizer.
        """
        check_cpu(package, self.name)
        if package.manifest["recipe"].get("cache"):
            raise PackageError(
                f"{package.path} stores its cache in 8 bits, which transformers.js does not: "
                "export the package without --kv-cache."
            )
        if package.precision not in _TYPES:
            raise PackageError(
                f"{package.path} is in {package.precision}, which transformers.js does not run: "
                f"export it in one of {', '.join(_TYPES)}."
            )
        chat_template(package, self.name)

    def fill(self, package: ModelPackage, folder: Path, name: str) -> Sequence[str]:
        """Write the model in transformers.js's layout, the page, and the sample for Node."""
        model = folder / "model"
        dtype = _TYPES[package.precision]
        file = f"model{_SUFFIXES[dtype]}.onnx"
        parts = write_graph(package, model / "onnx", file, self.limit)
        config = _read(package, "config.json")
        config["transformers.js_config"] = {
            "dtype": dtype,
            "use_external_data_format": {file: parts},
        }
        settings = _read(package, "tokenizer_config.json")
        settings["chat_template"] = chat_template(package, self.name)
        _write(model / "config.json", config)
        _write(model / "generation_config.json", generation(_read(package, "genai_config.json")))
        _write(model / "tokenizer_config.json", settings)
        (model / "tokenizer.json").write_bytes(read_listed(package, "tokenizer.json"))
        for kept in (*of_kind(package.files, *TERMS), PACKAGE_CARD):
            if kept in package.files:
                (model / kept).write_bytes(read_listed(package, kept))
        for template in ("index.html", "chat.js", "node.mjs", "package.json"):
            copy_template(self.name, template, folder)
        values = {
            "title": name,
            "model": describe_package(package),
            "licences": licence_files(package),
        }
        fill_template(self.name, "README.md", folder, values)
        return tuple(_warnings(package))


def generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json for a package with this genai_config.json."""
    model, search = settings["model"], settings.get("search", {})
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: model[key] for key in keys if key in model}
    return ids | {key: search[key] for key in _SEARCH if key in search}


def _warnings(package: ModelPackage) -> list[str]:
    said = []
    if package.data_path.stat().st_size > _WASM:
        said.append(
            "The weights exceed the 4 GB that WebAssembly can address: only Node can run them."
        )
    if package.adapters:
        said.append(
            f"transformers.js has no adapters: {', '.join(package.adapters)} is left out, and the "
            "model answers as without it."
        )
    return said


def _read(package: ModelPackage, name: str) -> dict[str, Any]:
    return parse_package_json(read_listed(package, name), package.path / name, unique=False)


def _write(file: Path, content: Mapping[str, Any]) -> None:
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
