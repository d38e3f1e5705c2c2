"""Sizes of memory as options: 500MB, 2GB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

_SIZES = {"MB": 10**6, "GB": 10**9}


def size_option(flag: str, help: str) -> Callable[[Any], Any]:
    """Return an option whose value reaches the command in bytes, None without it."""
    return click.option(flag, callback=_size, metavar="SIZE", help=help)


def _size(_: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    number, unit = value[:-2], value[-2:].upper()
    try:
        size = int(float(number) * _SIZES[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if not 0 < size < 1 << 60:
        flag = parameter.opts[0]
        raise UsageError(f"{flag} must be a size such as 500MB or 2GB, not {shown(value)}.")
    return size
