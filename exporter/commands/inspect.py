"""`llama-onnx inspect PATH`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.commands.describe import (
    describe_config,
    describe_counts,
    describe_recipe,
)
from llama_onnx.exporter.commands.options import Source, gigabytes, headers_of
from llama_onnx.exporter.commands.placement import print_placement
from llama_onnx.runtime.commands.options import optional_provider_options
from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.licences import of_kind
from llama_onnx.targets.package import MANIFEST, ModelPackage

if TYPE_CHECKING:
    from llama_onnx.exporter.model.checkpoint import Checkpoint
    from llama_onnx.targets.provider import Provider


_LABELS = {
    "dtypes": "types",
    "licence_files": "license files",
    "missing": "missing for a package",
}
"""Rows whose name is not the key of `--json`."""


@click.command(name="inspect")
@click.argument("path", type=Source)
@optional_provider_options
@click.option(
    "--profile", is_flag=True, help="With --provider: also run a step and show what executed it."
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(
    path: Path | HubId,
    provider: Provider | None,
    allow_fallback: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """Describe PATH, a checkpoint or a package.

    Reads headers only. For a model on the hub (OWNER/NAME) with safetensors weights, only the
    headers are downloaded.

    With --provider, opens a package on that provider and shows which node ONNX Runtime runs where.
    The exit status is 1 when the provider does not run every node that has weights.
    """
    place = headers_of(path)
    is_package = (place / MANIFEST).exists()
    if provider is None:
        if profile or allow_fallback:
            raise UsageError(
                "--profile and --allow-fallback have no effect without --provider: add it."
            )
        facts = package_facts(place) if is_package else checkpoint_facts(place)
        click.echo(json.dumps(facts)) if as_json else _print_facts(path, facts)
        return
    package = ModelPackage.open(place)
    found = placement_facts(package.model_path, provider, allow_fallback, profile)
    if as_json:
        click.echo(json.dumps({**package_facts(place), **found}))
    else:
        print_placement(place, found)


def placement_facts(
    model: Path, provider: Provider, allow_fallback: bool, profile: bool
) -> dict[str, Any]:
    """Return where the nodes of the graph at `model` run, and with `profile` where a step ran."""
    from llama_onnx.runtime.placement.profile import profile_step
    from llama_onnx.runtime.placement.session import open_session

    if profile:
        opened, step = profile_step(model, provider, allow_fallback=allow_fallback)
    else:
        opened = open_session(model, provider, allow_fallback=allow_fallback, prepack=False)
    return {
        "placement": opened.placement.to_json(),
        "fallback": opened.fallback,
        "profile": step.to_json() if profile else None,
    }


def _print_facts(path: Path | HubId, facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from llama_onnx.runtime.commands.tables import make_console

    table = Table(title=Text(str(path)), show_header=False)
    for name, value in _rows(facts):
        table.add_row(name, Text(value))
    make_console().print(table)


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each printed row; recipe and config give several."""
    tied = facts["config"].get("tie_word_embeddings", False)
    for name, value in facts.items():
        if name == "recipe":
            yield from describe_recipe(value, tied=tied)
        elif name == "config":
            yield from describe_config(value)
        elif name not in ("precision", "bytes"):
            yield _LABELS.get(name, name.replace("_", " ")), _row_text(name, value, facts)


def package_facts(path: Path) -> dict[str, Any]:
    """Return the facts in the manifest of the package at `path`."""
    package = ModelPackage.open(path)
    manifest = package.manifest
    source = manifest["source"]
    return {
        "kind": "package",
        "target": package.target,
        "precision": package.precision,
        "recipe": manifest["recipe"],
        "source": f"{source.get('name', '?')} ({source.get('format', 'unknown format')})",
        **({"commit": source["commit"]} if "commit" in source else {}),
        "tokenizer": "tokenizer.json" if package.has_tokenizer else None,
        "merged_adapters": source.get("adapters", []),
        "adapters": package.adapters,
        "config": manifest.get("config", {}),
        "created_with": manifest.get("created_with", {}),
        "files": {name: entry["size"] for name, entry in manifest["files"].items()},
    }


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """Return the facts in the headers of the checkpoint at `path`, and what is missing."""
    from llama_onnx.exporter.model.checkpoint import HoldsCodes, check_tensors
    from llama_onnx.exporter.sources import open_checkpoint
    from llama_onnx.exporter.tokenizer.source import (
        has_chat_template,
        source_codec,
        tokenizer_kind,
    )
    from llama_onnx.targets.errors import CheckpointError

    checkpoint = open_checkpoint(path)
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    try:
        check_tensors(checkpoint)
        source_codec(checkpoint.path)
        problem = "none"
    except CheckpointError as error:
        problem = str(error)
    return {
        "kind": "checkpoint",
        "format": checkpoint.format,
        "quantization": checkpoint.describe() if isinstance(checkpoint, HoldsCodes) else None,
        "config": asdict(checkpoint.config),
        "parameters": checkpoint.config.num_parameters(),
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors)),
        "files": list(checkpoint.fingerprint()),
        "tokenizer": tokenizer_kind(checkpoint.path),
        "chat_template": has_chat_template(checkpoint.path),
        "licence_files": [file.name for file in checkpoint.licence_files()],
        "missing": _missing(checkpoint),
        "warnings": list(checkpoint.warnings()),
        "problem": problem,
    }


def _missing(checkpoint: Checkpoint) -> list[str]:
    """Return what a package made from `checkpoint` would lack."""
    from llama_onnx.exporter.tokenizer.source import tokenizer_kind

    names = [file.name for file in checkpoint.licence_files()]
    present = {
        "tokenizer": tokenizer_kind(checkpoint.path) is not None,
        "licence": bool(of_kind(names, "license")),
        "end token": bool(checkpoint.config.eos_token_ids),
    }
    return [name for name, there in present.items() if not there]


def _row_text(name: str, value: Any, facts: dict[str, Any]) -> str:
    if name == "kind" and value == "package":
        return f"package ({facts['precision']})"
    if name == "parameters":
        return f"{value / 1e6:,.1f} million"
    if name == "tensors":
        return f"{value}, {gigabytes(facts['bytes'])}"
    if name == "dtypes":
        return describe_counts(value)
    if name == "tokenizer" and value is None:
        return "none: takes token ids only"
    if name == "adapters":
        return "\n".join(_adapter(name, entry) for name, entry in value.items()) or "none"
    if name == "created_with":
        return ", ".join(f"{tool} {version}" for tool, version in value.items()) or "unknown"
    if name == "files" and isinstance(value, dict):
        return "\n".join(f"{file}  {gigabytes(size)}" for file, size in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _adapter(name: str, entry: dict[str, Any]) -> str:
    targets = ", ".join(entry.get("targets", []))
    return f"{name}: rank {entry.get('rank')}, alpha {entry.get('alpha')}, changes {targets}"
