"""`llama-onnx sign PATH --key PRIVATE.pem`: so that others can tell who made a package."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llama_onnx.runtime.commands.keys import sign_with
from llama_onnx.targets.bundle import open_shipped
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import ModelPackage, remove_working_files
from llama_onnx.targets.signature import write_signature


@click.command("sign")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    metavar="PRIVATE.pem",
    type=click.Path(path_type=Path),
    help="Ed25519 key: `openssl genpkey -algorithm ed25519` makes one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(path: Path, key: Path, as_json: bool) -> None:
    """Sign PATH, a package or a bundle, with a private key of yours.

    What is signed is manifest.json (bundle.json of a bundle), which names every file by its sha256;
    each is checked first. `llama-onnx verify PATH --key PUBLIC.pem` checks the signature. A key's
    password is asked for, or taken from LLAMA_ONNX_KEY_PASSWORD.
    """
    shipped = open_shipped(path)
    sign = sign_with(key)
    if isinstance(shipped, ModelPackage):
        remove_working_files(path)
    if altered := shipped.verify():
        raise PackageError(f"{path} is damaged: {altered[0]} is not what was written.")
    if unnamed := shipped.unnamed():
        raise PackageError(
            f"{path} holds {', '.join(unnamed)}, which {shipped.index.name} does not name, so that "
            "nobody could check it: move it elsewhere."
        )
    file = write_signature(shipped.index, sign)
    click.echo(json.dumps({"signature": str(file)}) if as_json else f"{file}: signed")
