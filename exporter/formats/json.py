"""JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_onnx.exporter.formats.placeholder import refuse_placeholder
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside, read_inside
from llama_onnx.targets.strict_json import JSONError, parse_json

MAX_BYTES = 16 << 20
"""Largest file of settings: the index of Llama 3.1 405B has 0.1 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`, a file of a stranger's folder.

    Raises `CheckpointError` if the file is missing, unreadable, elsewhere or not a JSON object.
    """
    if file_inside(path.parent, path.name) is None:
        raise CheckpointError(f"{path.parent} has no {path.name}: pass a checkpoint folder.")
    content = read_inside(path.parent, path.name, max_bytes=MAX_BYTES)
    refuse_placeholder(path, content)
    try:
        value = parse_json(content)
    except JSONError as error:
        raise CheckpointError(
            f"{path} {error}: download it again or restore it from the source."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is not a JSON object: download it again or restore it from the source."
        )
    return value
