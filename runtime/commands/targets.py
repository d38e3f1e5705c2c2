"""`llama-onnx targets`: list the targets that packages can be made for."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.table import Table

from llama_onnx.runtime.commands.tables import make_console
from llama_onnx.targets.registry import TARGETS
from llama_onnx.targets.target import Target


@click.command("targets", short_help="List targets, their precisions and what to install.")
@click.option("--json", "as_json", is_flag=True, help="Print all details as JSON.")
def command(as_json: bool) -> None:
    """List the targets, their precisions and what to install.

    The last column is the argument of `pip install` in a clone of llama-onnx.
    """
    if as_json:
        click.echo(json.dumps([asdict(target) for target in TARGETS.values()], indent=2))
    else:
        make_console().print(_table())


def _table() -> Table:
    table = Table("target", "runs on", "precisions", "default")
    table.add_column("pip install", no_wrap=True)
    for target in TARGETS.values():
        table.add_row(*_row(target))
    return table


def _row(target: Target) -> tuple[str, ...]:
    graph = target.graph
    extra = f".[{target.session.provider.extra}]"
    precisions = ", ".join(graph.precisions)
    return target.name, target.description, precisions, graph.default_precision, extra
