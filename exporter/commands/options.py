"""Options that `export` and `plan` share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.registry import TARGETS

_F = TypeVar("_F", bound=Callable[..., Any])

Folder = click.Path(path_type=Path)


class _Source(click.ParamType[Path | HubId]):
    """A file or folder that exists, or else a model's id on the hub."""

    name = "source"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | HubId:
        hub = HubId.parse(str(value))
        if hub is not None and not Path(value).exists():
            return hub
        existing: Path = click.Path(exists=True, path_type=Path).convert(value, param, ctx)
        return existing


Source = _Source()


def headers_of(source: Path | HubId) -> Path:
    """Where the headers of `source` lie; a copy made for them goes when the command ends."""
    if isinstance(source, Path):
        return source
    from llama_onnx.exporter.checkpoints.download import fetch_headers

    folder = click.get_current_context().with_resource(tempfile.TemporaryDirectory())
    return fetch_headers(source, Path(folder))


_STORAGES = ("fp32", "fp16", "bf16", "int8", "int4")

_OPTIONS = (
    click.option(
        "--target",
        type=click.Choice(list(TARGETS)),
        default="cpu",
        show_default=True,
        help="Where the package will run.",
    ),
    click.option(
        "--precision",
        help="How weights are stored: fp32, fp16, bf16, int8 or int4, of which a target takes some "
        "(`llama-onnx targets`).  [default: a GPTQ or AWQ source's own, else the target's]",
    ),
    click.option(
        "--activations",
        type=click.Choice(["fp32", "fp16", "bf16"]),
        help="What flows between the operators.  [default: as the weights if these are floats the "
        "target computes in, else the target's]",
    ),
    click.option(
        "--block-size",
        type=int,
        default=32,
        show_default=True,
        help="Values that share a scale; 32 is closer to the original, 128 smaller and faster. "
        "Codes of a GPTQ or AWQ source keep their own.",
    ),
    click.option(
        "--quantizer",
        type=click.Choice(["rtn"]),
        default="rtn",
        show_default=True,
        help="How codes are chosen: rtn rounds to nearest.",
    ),
    click.option(
        "--embedding",
        type=click.Choice(_STORAGES),
        help="How the embedding is stored.  [default: int8 with int4, else the precision]",
    ),
    click.option(
        "--head",
        type=click.Choice(_STORAGES),
        help="How the output head is stored.  [default: as the embedding if tied to it, else the "
        "precision]",
    ),
    click.option(
        "--accuracy-level",
        type=click.Choice(["1", "4"]),
        help="Arithmetic of quantized matrices: 1 in fp32, 4 in int8.  [default: the target's]",
    ),
    click.option(
        "--fuse-gate-up/--no-fuse-gate-up",
        default=False,
        help="One matrix for the MLP's gate and up projections.  [default: off]",
    ),
    click.option(
        "--logits",
        type=click.Choice(["all", "last"]),
        default="all",
        show_default=True,
        help="Logits for every position, or the last only (faster prefill, no speculation).",
    ),
)


adapter_option = click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="DIR",
    help="Merge the LoRA adapter in DIR (PEFT's layout); may be given several times, in order.",
)

keep_option = click.option(
    "--keep-adapter",
    is_flag=True,
    help="Do not merge: keep each adapter (NAME=DIR, or DIR by its own name) beside the base, for "
    "`generate --adapter NAME`.",
)


def sort_adapters(values: Sequence[str], *, keep: bool) -> tuple[list[Path], dict[str, Path]]:
    """The folders to merge, and those to keep by name."""
    if not keep:
        return [Path(value) for value in values], {}
    if not values:
        raise UsageError("--keep-adapter keeps what --adapter names: give at least one.")
    from llama_onnx.exporter.packaging.adapters import named_adapters

    return [], named_adapters(values)


def export_options(function: _F) -> _F:
    """Add the options that decide what a package holds."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def make_options(**values: Any) -> Any:
    """The exporter's `Options` out of click's keyword arguments."""
    from llama_onnx.exporter.packaging.plan import Options

    level = values.pop("accuracy_level")
    return Options(accuracy_level=None if level is None else int(level), **values)


def explicit_options(names: Iterable[str]) -> frozenset[str]:
    """Return those of `names`, options of the running command, that the user gave."""
    context = click.get_current_context()
    sources = {name: context.get_parameter_source(name) for name in names}
    return frozenset(name for name in sources if sources[name] is ParameterSource.COMMANDLINE)


def gigabytes(count: int) -> str:
    """A size for people, decimal units as on a disk's label."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.1f} kB"
