"""`llama-onnx bundle PACKAGE OUT --for PLACE`: a package made ready for a place."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import click

from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.selftest import SelfTest
from llama_onnx.targets.windows import (
    COMPILER,
    CPU,
    DIRECTML,
    Bundled,
    bundle_windows,
    download_wheels,
)

_Existing = click.Path(exists=True, path_type=Path)
_Folder = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("bundle")
@click.argument("package", type=_Existing)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--for", "place", type=click.Choice(["windows"]), required=True, help="The place.")
@click.option("--wheels", type=_Folder, help="Folder of Windows wheels; otherwise pip gets them.")
@click.option("--cpu-only", is_flag=True, help="Leave DirectML's libraries out.")
@click.option(
    "--self-test",
    type=_Existing,
    help="Prompt and expected ids to prove DirectML by; otherwise of the certificate.",
)
@click.option("--zip", "as_zip", is_flag=True, help="Make OUT.zip of it as well.")
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
@click.option(
    "--i-have-the-licence",
    "licensed",
    is_flag=True,
    help="Go on without the model's LICENSE and USE_POLICY.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    package: Path,
    out: Path,
    place: str,
    wheels: Path | None,
    cpu_only: bool,
    self_test: Path | None,
    as_zip: bool,
    force: bool,
    licensed: bool,
    as_json: bool,
) -> None:
    """Make the folder OUT of PACKAGE, ready to ship in a Windows app.

    It holds the libraries, a C interface with samples, and all licences.
    """
    libraries = (CPU,) if cpu_only else (CPU, DIRECTML)
    opened = ModelPackage.open(package)
    test = SelfTest.read(self_test) if self_test else None
    with tempfile.TemporaryDirectory() as temporary:
        if wheels is None:
            wheels = Path(temporary)
            download_wheels(wheels, libraries)
        made = bundle_windows(
            opened,
            out,
            wheels,
            libraries=libraries,
            self_test=test,
            licensed=licensed,
            force=force,
            as_zip=as_zip,
            compiler=shutil.which(COMPILER),
        )
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)
    _report(made, as_json)


def _report(made: Bundled, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in made.path.rglob("*") if path.is_file())
    if as_json:
        packed = str(made.zip) if made.zip else None
        click.echo(json.dumps({"bundle": str(made.path), "bytes": size, "zip": packed}))
        return
    click.echo(f"{made.path}: {size / 1e6:,.1f} MB")
    if made.zip:
        click.echo(f"{made.zip}: {made.zip.stat().st_size / 1e6:,.1f} MB")
