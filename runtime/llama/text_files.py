"""Read the files in a package that the conversion between text and tokens needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.targets.errors import MissingDependencyError, PackageError, describe_reason
from llama_onnx.targets.folder_files import read_inside
from llama_onnx.targets.printable import printable
from llama_onnx.targets.strict_json import MAX_BYTES, JSONError, parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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


def read_encoder(folder: Path) -> Tokenizer:
    """Return the tokenizer in tokenizer.json; raises `PackageError` if it cannot be read."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    try:
        encoder = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise PackageError(f"{file} cannot be read: {error}.") from None
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def open_genai_tokenizer(folder: Path) -> None:
    """Open the tokenizer of the package in `folder` as `generate` and C programs do; without
    onnxruntime-genai, do nothing. Raises `PackageError` if it cannot be opened."""
    try:
        from llama_onnx.runtime.genai import og
    except (MissingDependencyError, ImportError):  # absent, or its libraries do not load
        return
    try:
        og.Tokenizer(og.Config(str(folder)))
    except Exception as error:  # a C++ library's own
        raise PackageError(
            f"onnxruntime-genai cannot open the tokenizer of {folder}: "
            f"{printable(describe_reason(error))}."
        ) from None
