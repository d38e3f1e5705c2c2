"""A JSON file of a stranger's package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.folder_files import file_inside, read_inside
from llama_onnx.targets.strict_json import JSONError, parse_json


def read_package_json(
    folder: Path, name: str, *, max_bytes: int, unique: bool = True
) -> dict[str, Any] | None:
    """Return the JSON object in the file `name` of the package in `folder`; None if there is no
    such file. With `unique`, no key may be there twice.

    Raises `PackageError` for a file that is damaged, elsewhere, or has more than `max_bytes`.
    """
    if file_inside(folder, name, PackageError) is None:
        return None
    content = read_inside(folder, name, PackageError, max_bytes=max_bytes)
    return parse_package_json(content, folder / name, unique=unique)


def parse_package_json(content: bytes, file: Path, *, unique: bool = True) -> dict[str, Any]:
    """Return the JSON object that is the `content` of `file`, as `read_package_json` does."""
    try:
        value = parse_json(content, unique=unique)
    except JSONError as error:
        raise PackageError(f"{file} is damaged: it {error}.") from None
    if not isinstance(value, dict):
        raise PackageError(f"{file} is damaged: it is not a JSON object.")
    return value
