"""`llama-onnx sign PATH --key PRIVATE.pem`: sign a package, so that users can check its origin."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llama_onnx.runtime.commands.keys import sign_with
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.bundle import open_shipped
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage, name_package, remove_working_files
from llama_onnx.targets.signature import write_signature


@click.command("sign", short_help="Sign a package or bundle with your private key.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    metavar="PRIVATE.pem",
    type=click.Path(path_type=Path),
    help="Ed25519 private key; make one with `openssl genpkey -algorithm ed25519`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path, key: Path, as_json: bool) -> None:
    """Sign PATH, a package or a bundle, with your private key.

    The signed file is manifest.json (bundle.json in a bundle), which lists every file by sha256,
    and says the folder's name and what the package was made from; all files are checked first.
    Check a signature with `llama-onnx verify PATH --key PUBLIC.pem`. The key's password is read
    from LLAMA_ONNX_KEY_PASSWORD or the terminal.
    """
    file = sign_path(path, key)
    say(json.dumps({"signature": str(file)}) if as_json else f"{file}: signed")


def sign_path(path: Path, key: Path) -> Path:
    """Sign the package or bundle `path` with the private key `key`; return the signature's file.

    Raises `PackageError` for one that is damaged or has files that the signature would not cover.
    """
    shipped = open_shipped(path)
    sign = sign_with(key)
    if isinstance(shipped, ModelPackage):
        remove_working_files(path)
    if altered := shipped.verify():
        raise PackageError(f"{path} is damaged: {altered[0]} is missing or was changed.")
    if unknown := shipped.unlisted().unknown:
        raise PackageError(
            f"{path} contains {', '.join(unknown)}, which {shipped.index.name} does not "
            "list and the signature would not cover: move it elsewhere."
        )
    if isinstance(shipped, ModelPackage):
        shipped = name_package(shipped)
    return write_signature(shipped.index, sign)
