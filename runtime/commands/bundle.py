"""`llama-onnx bundle PACKAGE OUT --for PLACE`: a package made ready for a place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from llama_onnx.runtime.bundles.azureml import bundle_azureml
from llama_onnx.runtime.bundles.hub import bundle_hub
from llama_onnx.runtime.bundles.make import Bundled
from llama_onnx.runtime.bundles.sagemaker import bundle_sagemaker
from llama_onnx.runtime.bundles.selftest import SelfTest
from llama_onnx.runtime.bundles.windows import (
    COMPILER,
    CPU,
    DIRECTML,
    bundle_windows,
    download_wheels,
)
from llama_onnx.runtime.commands.keys import sign_with
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage

_Existing = click.Path(exists=True, path_type=Path)
_Folder = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class Place:
    """A place to make bundles for: what makes them, and the options that only it takes."""

    make: Callable[..., Bundled]
    options: Collection[str] = ()


def _make_windows(
    package: ModelPackage,
    out: Path,
    *,
    wheels: Path | None,
    cpu_only: bool,
    self_test: Path | None,
    **common: Any,
) -> Bundled:
    libraries = (CPU,) if cpu_only else (CPU, DIRECTML)
    test = SelfTest.read(self_test) if self_test else None
    with tempfile.TemporaryDirectory() as temporary:
        if wheels is None:
            wheels = Path(temporary)
            download_wheels(wheels, libraries)
        return bundle_windows(
            package,
            out,
            wheels,
            libraries=libraries,
            self_test=test,
            compiler=shutil.which(COMPILER),
            **common,
        )


PLACES = {
    "windows": Place(_make_windows, ("wheels", "cpu_only", "self_test")),
    "azureml": Place(bundle_azureml),
    "sagemaker": Place(bundle_sagemaker),
    "hub": Place(bundle_hub),
}
"""What `--for` takes. A new place is a new file, and one more line here."""


@click.command("bundle")
@click.argument("package", type=_Existing)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--for", "place", type=click.Choice(list(PLACES)), required=True, help="The place.")
@click.option(
    "--wheels", type=_Folder, help="windows: folder of its wheels; otherwise pip gets them."
)
@click.option("--cpu-only", is_flag=True, help="windows: leave DirectML's libraries out.")
@click.option(
    "--self-test",
    type=_Existing,
    help="windows: prompt and expected ids to prove DirectML by; otherwise of the certificate.",
)
@click.option("--zip", "as_zip", is_flag=True, help="Make OUT.zip of it as well.")
@click.option("--sign", "key", type=_Existing, help="Sign it with this ed25519 key, a PEM file.")
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
@click.option(
    "--i-have-the-licence",
    "licensed",
    is_flag=True,
    help="Go on without the model's LICENSE and USE_POLICY.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_context
def command(
    context: click.Context,
    /,
    package: Path,
    out: Path,
    place: str,
    key: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make the folder OUT of PACKAGE, ready for a place, with all licences.

    windows: libraries, a C interface and samples for an app. azureml: a managed online endpoint.
    sagemaker: a container and the calls that deploy it. hub: a model card with the parity table.
    """
    _refuse_foreign(context, place)
    foreign = {name for other in PLACES.values() for name in other.options}
    own = PLACES[place].options
    taken = {name: value for name, value in options.items() if name in own or name not in foreign}
    taken["sign"] = sign_with(key) if key else None
    made = PLACES[place].make(ModelPackage.open(package), out, **taken)
    for warning in made.warnings:
        click.echo(f"Warning: {warning}", err=True)
    _report(made, as_json)


def _refuse_foreign(context: click.Context, place: str) -> None:
    """Raise `UsageError` for an option that was given and is another place's."""
    for name, other in PLACES.items():
        for option in other.options:
            given = context.get_parameter_source(option) == ParameterSource.COMMANDLINE
            if given and option not in PLACES[place].options:
                flag = f"--{option.replace('_', '-')}"
                raise UsageError(f"{flag} goes with --for {name} alone: leave it out.")


def _report(made: Bundled, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in made.path.rglob("*") if path.is_file())
    if as_json:
        packed = str(made.zip) if made.zip else None
        click.echo(json.dumps({"bundle": str(made.path), "bytes": size, "zip": packed}))
        return
    click.echo(f"{made.path}: {size / 1e6:,.1f} MB")
    if made.zip:
        click.echo(f"{made.zip}: {made.zip.stat().st_size / 1e6:,.1f} MB")
