"""Read the files in a package that the conversion between text and tokens needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_onnx.runtime.llama.template import check_genai_reads
from llama_onnx.targets.errors import MissingDependencyError, PackageError, describe_reason
from llama_onnx.targets.folder_files import read_inside
from llama_onnx.targets.printable import printable
from llama_onnx.targets.strict_json import MAX_BYTES, JSONError, parse_json


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the `model` part of genai_config.json; raises `PackageError` for a damaged one."""
    name = "genai_config.json"
    try:
        text = read_inside(folder, name, PackageError, max_bytes=MAX_BYTES)
        settings = dict(parse_json(text)["model"])
        int(settings["context_length"]), int(settings["vocab_size"])
    except (JSONError, KeyError, TypeError, ValueError):
        raise PackageError(
            f"{folder / name} is missing or damaged: it has no context length or vocabulary."
        ) from None
    return settings


def open_genai_tokenizer(folder: Path) -> Any:
    """Open the tokenizer of the package in `folder` as `generate` and C programs do; None without
    onnxruntime-genai. Raises `PackageError` if it cannot be opened."""
    try:
        from llama_onnx.runtime.genai import og
    except (MissingDependencyError, ImportError):  # absent, or its libraries do not load
        return None
    check_genai_reads(folder)
    try:
        return og.Tokenizer(og.Config(str(folder)))
    except Exception as error:  # a C++ library's own
        raise PackageError(
            f"onnxruntime-genai cannot open the tokenizer of {folder}: "
            f"{printable(describe_reason(error))}."
        ) from None
