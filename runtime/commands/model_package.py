"""`llama-onnx model-package make OUT PACKAGE...`: several targets over one set of weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llama_onnx.runtime.commands.streams import say
from llama_onnx.targets.package import ModelPackage
from llama_onnx.targets.registry import TARGETS


@click.group("model-package", short_help="Combine packages for several targets.")
def command() -> None:
    """Combine packages for several targets in one of ONNX Runtime's model packages, and take them
    out again.

    `onnxruntime.ModelPackage` chooses the variant of a provider in it. The other commands take
    packages: extract one first.
    """


@command.command("make", short_help="Combine packages for several targets.")
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("packages", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def make(out: Path, packages: tuple[Path, ...], as_json: bool) -> None:
    """Combine PACKAGES, made from one checkpoint for different targets, in the new folder OUT.

    Tensors with equal bytes are stored once.
    """
    from llama_onnx.runtime.bundles.variants import combine

    done = combine([ModelPackage.open(package) for package in packages], out)
    if as_json:
        say(json.dumps(done.to_json()))
        return
    saved = done.weight_bytes - done.stored_bytes
    say(
        f"{out}: {', '.join(done.targets)}; {done.stored_bytes / 1e6:.1f} MB of weights instead of "
        f"{done.weight_bytes / 1e6:.1f} MB ({saved / done.weight_bytes:.0%} saved)"
    )


@command.command("extract", short_help="Take the package for one target out again.")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(list(TARGETS)), required=True, help="The target.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def extract_one(path: Path, out: Path, target: str, as_json: bool) -> None:
    """Take the package for one target out of the model package PATH, into the new folder OUT.

    It is byte for byte the one that went in: its certificate and our signature hold.
    """
    from llama_onnx.runtime.bundles.variants import extract

    package = extract(path, target, out)
    files = len(package.files)
    say(json.dumps({"package": str(out), "files": files}) if as_json else f"{out}: {files} files")
