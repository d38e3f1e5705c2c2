"""Private keys and their passwords."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.signature import Signer, read_signer

PASSWORD_VARIABLE = "LLAMA_ONNX_KEY_PASSWORD"


def sign_with(key: Path) -> Signer:
    """Return a function that signs with the private key in the file `key`.

    The password of a protected key comes from LLAMA_ONNX_KEY_PASSWORD or the terminal. Raises
    `UsageError` for a file that is not such a key, and if no password can be read.
    """
    return read_signer(key, lambda: ask_password(key))


def ask_password(key: Path) -> str:
    """Return the password of `key` from LLAMA_ONNX_KEY_PASSWORD or the terminal.

    Raises `UsageError` if there is neither.
    """
    if PASSWORD_VARIABLE in os.environ or not sys.stdin.isatty():
        return given_password(key)
    password: str = click.prompt(f"Password of {key}", hide_input=True, err=True)
    return password


def given_password(key: Path) -> str:
    """Return the password of `key` from LLAMA_ONNX_KEY_PASSWORD. Raises `UsageError` without it."""
    given = os.environ.get(PASSWORD_VARIABLE)
    if given is None:
        raise UsageError(f"{key} is protected by a password: set {PASSWORD_VARIABLE}.")
    return given
