"""Read the files in a package that the conversion between text and tokens needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.targets.errors import PackageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the `model` part of genai_config.json; raises `PackageError` for a damaged one."""
    file = folder / "genai_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["model"]
        int(settings["context_length"])
    except (OSError, ValueError, KeyError, TypeError):
        raise PackageError(f"{file} is missing or damaged: it has no context length.") from None
    return dict(settings)


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
