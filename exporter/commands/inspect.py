"""`llama-onnx inspect PATH`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llama_onnx.exporter.commands.options import Folder, gigabytes
from llama_onnx.targets.package import MANIFEST, ModelPackage


@click.command(name="inspect")
@click.argument("path", type=Folder)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(path: Path, as_json: bool) -> None:
    """Say what PATH is: a checkpoint or a package. Reads headers only."""
    from rich.console import Console
    from rich.table import Table

    is_package = (path / MANIFEST).exists()
    facts = package_facts(path) if is_package else checkpoint_facts(path)
    if as_json:
        click.echo(json.dumps(facts))
        return
    table = Table(title=str(path), show_header=False)
    for name, value in facts.items():
        table.add_row(name, _for_people(name, value))
    Console().print(table)


def package_facts(path: Path) -> dict[str, Any]:
    """What the manifest of the package at `path` says."""
    package = ModelPackage.open(path)
    manifest = package.manifest
    return {
        "kind": "package",
        "target": package.target,
        "precision": package.precision,
        "recipe": manifest["recipe"],
        "source": f"{manifest['source']['name']} ({manifest['source']['format']})",
        "adapters": manifest["source"].get("adapters", []),
        "config": manifest.get("config", {}),
        "created_with": manifest.get("created_with", {}),
        "files": {name: entry["size"] for name, entry in manifest["files"].items()},
    }


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What the headers of the checkpoint at `path` say, and what is missing."""
    from llama_onnx.exporter.checkpoints import check_tensors, open_checkpoint
    from llama_onnx.targets.errors import CheckpointError

    checkpoint = open_checkpoint(path)
    tensors = [checkpoint.tensor(name) for name in checkpoint.names()]
    try:
        check_tensors(checkpoint)
        problem = "none"
    except CheckpointError as error:
        problem = str(error)
    return {
        "kind": "checkpoint",
        "format": checkpoint.format,
        "config": asdict(checkpoint.config),
        "parameters": checkpoint.config.num_parameters(),
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors)),
        "files": list(checkpoint.fingerprint()),
        "licence_files": [file.name for file in checkpoint.licence_files()],
        "problem": problem,
    }


def _for_people(name: str, value: Any) -> str:
    if name == "bytes":
        return gigabytes(value)
    if name == "parameters":
        return f"{value / 1e6:,.1f} M"
    if name == "files" and isinstance(value, dict):
        return "\n".join(f"{file}  {gigabytes(size)}" for file, size in value.items())
    if isinstance(value, dict):
        return "\n".join(f"{key}: {entry}" for key, entry in value.items())
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return str(value)
