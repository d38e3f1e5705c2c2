"""Options that `export` and `plan` share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from llama_onnx.exporter.checkpoints.hub import HubId, find_source
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.registry import TARGETS

_F = TypeVar("_F", bound=Callable[..., Any])

Folder = click.Path(path_type=Path)


class _Source(click.ParamType[Path | HubId]):
    """A file or folder that exists, or the id of a model on the hub."""

    name = "source"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | HubId:
        source = find_source(str(value))
        if isinstance(source, HubId):
            return source
        existing: Path = click.Path(exists=True, path_type=Path).convert(value, param, ctx)
        return existing


Source = _Source()


def headers_of(source: Path | HubId) -> Path:
    """Return the folder with the headers of `source`.

    Those of a model on the hub are downloaded to a folder that is removed when the command ends.
    """
    if isinstance(source, Path):
        return source
    from llama_onnx.exporter.checkpoints.download import fetch_headers

    folder = click.get_current_context().with_resource(tempfile.TemporaryDirectory())
    return fetch_headers(source, Path(folder))


target_option = click.option(
    "--target",
    type=click.Choice(list(TARGETS)),
    default="cpu",
    show_default=True,
    help="Where the package will run.",
)


adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR",
    help="Merge the LoRA adapter in DIR, in PEFT's layout. May be repeated; the order matters.",
)

keep_option = click.option(
    "--keep-adapter",
    is_flag=True,
    help="Do not merge: keep each adapter beside the base, for `generate --adapter NAME`. Pass it "
    "as NAME=DIR, or as DIR to name it after the folder.",
)


def sort_adapters(values: Sequence[str], *, keep: bool) -> tuple[list[Path], dict[str, Path]]:
    """Return the adapter folders to merge, and those to keep, by name."""
    if not keep:
        return [Path(value) for value in values], {}
    if not values:
        raise UsageError("--keep-adapter needs at least one --adapter to keep.")
    from llama_onnx.exporter.packaging.adapters import named_adapters

    return [], named_adapters(values)


def export_options(function: _F) -> _F:
    """Add `--target` and an option for each field of `Options`."""
    for field in reversed(fields(Options)):
        function = _option(field)(function)
    return target_option(function)


def _option(field: Field[Any]) -> Callable[[_F], _F]:
    """Return the command line's option for a field of `Options`."""
    metadata, flag = field.metadata, f"--{field.name.replace('_', '-')}"
    if field.default in (True, False):
        flag += f"/--no-{flag.removeprefix('--')}"
    return click.option(
        flag,
        type=_type(metadata),
        default=field.default,
        show_default=metadata["otherwise"] or True,
        help=metadata["help"],
    )


def _type(metadata: Mapping[str, Any]) -> Any:
    """Return click's type for the values of a field; None leaves it to the default."""
    if metadata["choices"]:
        return click.Choice(list(metadata["choices"]))
    return metadata["number"]


def explicit_options(names: Iterable[str]) -> frozenset[str]:
    """Return those of `names`, options of the running command, that the user passed."""
    context = click.get_current_context()
    sources = {name: context.get_parameter_source(name) for name in names}
    return frozenset(name for name in sources if sources[name] is ParameterSource.COMMANDLINE)


def gigabytes(count: int) -> str:
    """Return a size as text in decimal units, as on a disk's label."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    if count >= 1e3:
        return f"{count / 1e3:.1f} kB"
    return f"{count} bytes"
