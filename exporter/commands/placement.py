"""Print where the nodes of a package run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_onnx.exporter.commands.options import gigabytes

if TYPE_CHECKING:
    from rich.table import Table


def print_placement(path: Path, found: dict[str, Any]) -> None:
    """Print a table of the providers' shares, then one of the nodes that run elsewhere.

    `found` is what `inspect.placement_facts` returns.
    """
    from rich.text import Text

    from llama_onnx.runtime.commands.tables import make_console

    console, placement = make_console(), found["placement"]
    console.print(_shares(path, placement["providers"]))
    # After a fallback the first table already shows that another provider runs everything.
    if placement["elsewhere"] and not found["fallback"]:
        console.print(_elsewhere(placement["asked"], placement["elsewhere"]))
    for line in _lines(found):
        console.print(Text(line))


def _shares(path: Path, providers: list[dict[str, Any]]) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    first = Column("provider", no_wrap=True)
    table = Table(first, "nodes", "weights", "work per token", title=Text(str(path)))
    for share in providers:
        table.add_row(share["provider"], *_figures(share))
    return table


def _figures(share: dict[str, Any]) -> tuple[str, str, str]:
    from llama_onnx.runtime.placement.shares import percent

    fraction = share["fraction"]
    nodes = f"{share['nodes']} = {percent(fraction['nodes'])}"
    if share["weight_bytes"] is None:
        return nodes, "unknown", "unknown"
    weights = f"{gigabytes(share['weight_bytes'])} = {percent(fraction['weight_bytes'])}"
    return nodes, weights, percent(fraction["macs_per_token"])


def _elsewhere(asked: str, nodes: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    groups: dict[tuple[str, str, bool], list[str]] = {}
    for node in nodes:
        groups.setdefault((node["op"], node["provider"], node["heavy"]), []).append(node["name"])
    table = Table("operator", "runs on", "nodes", "which", title=f"not on {asked}")
    for (op, provider, heavy), names in sorted(groups.items(), key=lambda group: not group[0][2]):
        which = "\n".join(names) if heavy else "small: no weights, little work"
        table.add_row(op, provider, str(len(names)), which)
    return table


def _lines(found: dict[str, Any]) -> list[str]:
    placement, lines = found["placement"], []
    if found["fallback"]:
        lines.append(f"{found['fallback']} The CPU runs it instead, as --allow-fallback allows.")
    if placement["unplaced"]:
        names = ", ".join(placement["unplaced"])
        lines.append(f"Merged into other nodes, so no share counts their weights: {names}.")
    if placement["attention_counted_at"] is None:
        lines.append("Weights and work are unknown: the package was made by an older llama-onnx.")
    else:
        at = placement["attention_counted_at"]
        lines.append(f"As assigned by ONNX Runtime; attention is counted at {at:,} positions.")
    return lines + (_profile(found["profile"]) if found["profile"] else [])


def _profile(profile: dict[str, Any]) -> list[str]:
    lines = [
        f"A prefill of {profile['tokens']} tokens ran {kernels['count']} kernels on "
        f"{kernels['provider']}, {kernels['copies']} of them copies, in "
        f"{kernels['microseconds'] / 1000:.1f} ms."
        for kernels in profile["kernels"]
    ]
    moved = [f"{name} ran on {provider}" for name, provider in profile["moved"].items()]
    return lines + [f"Not as assigned: {text}." for text in moved]
