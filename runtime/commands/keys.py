"""The key that signs, its password, and where that comes from."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.signature import Signer, read_signer

PASSWORD_VARIABLE = "LLAMA_ONNX_KEY_PASSWORD"


def sign_with(key: Path) -> Signer:
    """What signs with the key in the file `key`.

    The password of one that has one is that in the environment, or asked for. Raises `UsageError`,
    also where there is nobody to ask.
    """

    def ask() -> str:
        if (given := os.environ.get(PASSWORD_VARIABLE)) is not None:
            return given
        if not sys.stdin.isatty():
            raise UsageError(f"{key} is protected by a password: set {PASSWORD_VARIABLE} to it.")
        password: str = click.prompt(f"Password of {key}", hide_input=True, err=True)
        return password

    return read_signer(key, ask)
