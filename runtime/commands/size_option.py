"""Sizes of memory as options: 500MB, 2GB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown
from llama_onnx.targets.sizes import parse_size


def size_option(flag: str, help: str) -> Callable[[Any], Any]:
    """Return an option whose value reaches the command in bytes, None without it."""
    return click.option(flag, callback=_size, metavar="SIZE", help=help)


def _size(_: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    size = parse_size(value)
    if size is None:
        flag = parameter.opts[0]
        raise UsageError(f"{flag} must be a size such as 500MB or 2GB, not {shown(value)}.")
    return size
