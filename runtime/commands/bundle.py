"""`llama-onnx bundle PACKAGE OUT --for PLACE`: prepare a package for a place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from llama_onnx.runtime.bundles.make import Bundled, Settings, make_bundle
from llama_onnx.runtime.bundles.place import Option
from llama_onnx.runtime.bundles.places import OPTIONS, PLACES, get_place, places_with
from llama_onnx.runtime.commands.keys import sign_with
from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.package import ModelPackage

_Command = TypeVar("_Command", bound=Callable[..., Any])

_EXISTING = click.Path(exists=True, path_type=Path)
_TYPES = {"file": _EXISTING, "folder": click.Path(exists=True, file_okay=False, path_type=Path)}

_SUMMARIES = "\n".join(f"  {place.name:<9}  {place.summary}" for place in PLACES.values())

_HELP = f"""Prepare PACKAGE for a place, in the new folder OUT.

OUT contains everything that the place needs, licenses included. Places:

\b
{_SUMMARIES}
"""


def _place_options(command: _Command) -> _Command:
    """Add the options that only some places take; their help names those places."""
    for option in reversed(OPTIONS.values()):
        command = _click_option(option)(command)
    return command


def _click_option(option: Option) -> Callable[[_Command], _Command]:
    text = f"[{', '.join(places_with(option.name))}] {option.help}"
    if option.kind == "flag":
        return click.option(option.flag, option.name, is_flag=True, help=text)
    return click.option(option.flag, option.name, type=_TYPES[option.kind], help=text)


def _one_place(_context: click.Context, _option: click.Parameter, places: tuple[str, ...]) -> str:
    """Return the place; click alone would take the last of several without a word."""
    if len(set(places)) > 1:
        raise UsageError(
            "--for takes one place: make one bundle for each, in folders of their own."
        )
    return places[0]


@click.command("bundle", help=_HELP, short_help="Prepare a package for Windows, a cloud, the hub.")
@click.argument("package", type=_EXISTING)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "place",
    type=click.Choice(list(PLACES)),
    required=True,
    multiple=True,
    callback=_one_place,
    help="Where the bundle will be used.",
)
@_place_options
@click.option("--zip", "as_zip", is_flag=True, help="Also pack the bundle into OUT.zip.")
@click.option("--sign", "key", type=_EXISTING, help="Sign with this ed25519 key, a PEM file.")
@click.option(
    "--bom", is_flag=True, help="Write a bill of materials too, bom.cdx.json (CycloneDX)."
)
@click.option("--force", is_flag=True, help="Replace OUT if it is a bundle.")
@click.option(
    "--i-have-the-licence",
    "licensed",
    is_flag=True,
    help="Continue without the model's LICENSE and USE_POLICY.",
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
    as_zip: bool,
    bom: bool,
    force: bool,
    licensed: bool,
    **options: Any,
) -> None:
    """Make a bundle; `options` are those that only some places take."""
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    settings = Settings(licensed, force, as_zip, sign_with(key) if key else None, bom)
    made = make_bundle(ModelPackage.open(package), out, get_place(place, given), settings)
    for warning in made.warnings:
        say(f"Warning: {warning}", err=True)
    _report(made, as_json)


def _report(made: Bundled, as_json: bool) -> None:
    size = sum(path.stat().st_size for path in made.path.rglob("*") if path.is_file())
    if as_json:
        packed = str(made.zip) if made.zip else None
        click.echo(json.dumps({"bundle": str(made.path), "bytes": size, "zip": packed}))
        return
    say(f"{made.path}: {size / 1e6:,.1f} MB")
    if made.zip:
        say(f"{made.zip}: {made.zip.stat().st_size / 1e6:,.1f} MB")
