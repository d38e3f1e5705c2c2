"""`llama-onnx sign PATH --key PRIVATE.pem`: sign a package, so that users can check its origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import click

from llama_onnx.runtime.commands.keys import ask_password, sign_with
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.bundle import open_shipped
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.listing import signature_files
from llama_onnx.targets.oms import write_oms_signature
from llama_onnx.targets.package import ModelPackage, name_package, remove_working_files
from llama_onnx.targets.pem import read_curve_key
from llama_onnx.targets.signature import write_signature


@click.command("sign", short_help="Sign a package or bundle with your private key.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    metavar="PRIVATE.pem",
    type=click.Path(path_type=Path),
    help="Private key, ed25519 or, for oms, P-256; docs/signing.md says how to make one.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["ed25519", "oms"]),
    default="ed25519",
    show_default=True,
    help="Ours, or OpenSSF's model signing (model.sig), which other tools check too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path, key: Path, kind: str, as_json: bool) -> None:
    """Sign PATH, a package or a bundle, with your private key.

    The signed file is manifest.json (bundle.json in a bundle), which lists every file by sha256,
    and says the folder's name and what the package was made from; all files are checked first.
    With --format oms, model.sig lists and signs every file in the folder. A package may have both.
    Check a signature with `llama-onnx verify PATH --key PUBLIC.pem`. The key's password is read
    from LLAMA_ONNX_KEY_PASSWORD or the terminal.
    """
    file = sign_path(path, key, kind)
    say(json.dumps({"signature": str(file)}) if as_json else f"{file}: signed")


def sign_path(path: Path, key: Path, kind: str = "ed25519") -> Path:
    """Sign the package or bundle `path` with the private key `key`; return the signature's file.

    Raises `PackageError` for one that is damaged or has files that the signature would not cover.
    """
    shipped = open_shipped(path)
    write = _writer(kind, key)
    if isinstance(shipped, ModelPackage):
        remove_working_files(path)
    if altered := shipped.verify():
        raise PackageError(f"{path} is damaged: {altered[0]} is missing or was changed.")
    if unknown := shipped.unlisted().unknown:
        raise PackageError(
            f"{path} contains {', '.join(unknown)}, which {shipped.index.name} does not "
            "list and the signature would not cover: move it elsewhere."
        )
    ours, oms = signature_files(shipped.index)
    if isinstance(shipped, ModelPackage):
        shipped = name_package(shipped, oms if kind == "oms" else ours)
    return write(shipped.index)


def _writer(kind: str, key: Path) -> Callable[[Path], Path]:
    """Return the function that writes a signature; the key is read now, before minutes of hashing.

    Raises `UsageError` for a key of the wrong kind.
    """
    if kind == "oms":
        password = cache(lambda: ask_password(key))
        read_curve_key(key, password)
        return lambda index: write_oms_signature(index, key, password)
    sign = sign_with(key)
    return lambda index: write_signature(index, sign)
