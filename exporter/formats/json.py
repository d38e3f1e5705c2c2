"""JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises `CheckpointError` if the file is missing, unreadable or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}: pass a checkpoint folder."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError:
        raise CheckpointError(
            f"{path} is not UTF-8 text: download it again or restore it from the source."
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}): "
            "download it again or restore it from the source."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is not a JSON object: download it again or restore it from the source."
        )
    return value
