"""`llama-onnx adapter add PACKAGE NAME=DIR`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.options import Source, headers_of
from llama_onnx.runtime.commands.streams import say


@click.group(name="adapter", short_help="Change the adapters that a package keeps.")
def command() -> None:
    """Change the LoRA adapters that a package keeps beside its base.

    `llama-onnx export --keep-adapter` makes such a package.
    """


@command.command(name="add", short_help="Add adapters to a finished package.")
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("adapters", nargs=-1, required=True, metavar="NAME=DIR...")
@click.option(
    "--base",
    required=True,
    type=Source,
    help="The checkpoint the package was made from, here or on the hub (OWNER/NAME).",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def add(package: Path, adapters: tuple[str, ...], base: Path | HubId, as_json: bool) -> None:
    """Add the LoRA adapter in DIR (PEFT's layout) to PACKAGE as NAME.

    The graph and weights of PACKAGE do not change, so the graph must already let adapters change
    the same matrices. Without NAME=, the adapter is named after its folder.
    """
    from llama_onnx.exporter.packaging.adapters import named_adapters
    from llama_onnx.exporter.packaging.add_adapters import add_adapters
    from llama_onnx.exporter.sources import open_checkpoint

    folders = named_adapters(adapters)
    warnings = add_adapters(package, open_checkpoint(headers_of(base)), folders)
    for warning in warnings:
        say(f"Warning: {warning}", err=True)
    if as_json:
        added = {"package": str(package), "added": list(folders), "warnings": warnings}
        click.echo(json.dumps(added))
        return
    say(f"{package} now also has {', '.join(folders)}; opened and ran a step with each.")
