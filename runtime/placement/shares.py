"""Where the nodes of an open graph run: each provider's share of nodes, weights and work."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import MANIFEST

HEAVY_OPERATORS = {
    "Attention",
    "FusedMatMul",
    "GatherBlockQuantized",
    "Gemm",
    "GroupQueryAttention",
    "MatMul",
    "MatMulNBits",
    "MultiHeadAttention",
}
"""Operators of heavy nodes, for packages without a table of costs."""


@dataclass(frozen=True)
class Cost:
    """Bytes of the weights a node reads, and its multiply-accumulates for one new token."""

    weight_bytes: int
    macs_per_token: int


@dataclass(frozen=True)
class GraphCosts:
    """The exporter's table of costs: node name -> cost, of the nodes that do the work.

    `context` is the number of cached positions for which attention was counted.
    """

    context: int
    nodes: Mapping[str, Cost]


@dataclass(frozen=True)
class AssignedNode:
    """A node and the provider (by ONNX Runtime's name) that it is assigned to."""

    name: str
    op_type: str
    provider: str


@dataclass(frozen=True)
class Share:
    """A provider's share of the graph; bytes and MACs are None without the exporter's table."""

    provider: str
    nodes: int
    weight_bytes: int | None
    macs_per_token: int | None


@dataclass(frozen=True)
class Placement:
    """Where ONNX Runtime assigned each node, compared with the requested provider, `asked`.

    Nodes that ONNX Runtime folded away or merged when it opened the graph are in no share;
    `unplaced` lists those that had weights.
    """

    asked: str
    nodes: tuple[AssignedNode, ...]
    costs: GraphCosts | None

    @property
    def shares(self) -> tuple[Share, ...]:
        """The share of each provider that has nodes, the requested provider first."""
        counts = Counter(node.provider for node in self.nodes)
        providers = sorted(counts, key=lambda name: (name != self.asked, -counts[name]))
        return tuple(self._share(provider) for provider in providers)

    @property
    def elsewhere(self) -> tuple[AssignedNode, ...]:
        """The nodes that are not on the requested provider."""
        return tuple(node for node in self.nodes if node.provider != self.asked)

    @property
    def heavy_elsewhere(self) -> tuple[AssignedNode, ...]:
        """Those of `elsewhere` that have weights or do attention."""
        return tuple(node for node in self.elsewhere if self.is_heavy(node))

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Nodes with weights whose names are not in ONNX Runtime's assignment."""
        if self.costs is None:
            return ()
        assigned = {node.name for node in self.nodes}
        return tuple(name for name in self.costs.nodes if name not in assigned)

    def is_heavy(self, node: AssignedNode) -> bool:
        """Whether `node` reads weights or does attention, by the table or by its operator."""
        if self.costs is None:
            return node.op_type in HEAVY_OPERATORS
        return node.name in self.costs.nodes

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; each `fraction` is of the whole graph."""
        return {
            "asked": self.asked,
            "source": "onnxruntime's own assignment",
            "attention_counted_at": self.costs.context if self.costs else None,
            "providers": [self._share_json(share) for share in self.shares],
            "elsewhere": [
                {
                    "name": node.name,
                    "op": node.op_type,
                    "provider": node.provider,
                    "heavy": self.is_heavy(node),
                }
                for node in self.elsewhere
            ],
            "unplaced": list(self.unplaced),
        }

    def __str__(self) -> str:
        """Return a line for each share, then what is not on the requested provider."""
        lines = [self._share_text(share) for share in self.shares]
        if self.elsewhere:
            lines.append(f"not on {self.asked}: {summarize(self.elsewhere)}")
        if self.unplaced:
            lines.append(f"merged by ONNX Runtime, in no share: {len(self.unplaced)} with weights")
        if self.costs is None:
            lines.append("weights and work unknown: the package was made by an older llama-onnx")
        return "\n".join(lines)

    def _share(self, provider: str) -> Share:
        names = [node.name for node in self.nodes if node.provider == provider]
        if self.costs is None:
            return Share(provider, len(names), None, None)
        costs = [self.costs.nodes[name] for name in names if name in self.costs.nodes]
        return Share(
            provider,
            len(names),
            sum(cost.weight_bytes for cost in costs),
            sum(cost.macs_per_token for cost in costs),
        )

    def _fractions(self, share: Share) -> dict[str, float | None]:
        costs = self.costs.nodes.values() if self.costs else ()
        return {
            "nodes": _fraction(share.nodes, len(self.nodes)),
            "weight_bytes": _fraction(share.weight_bytes, sum(c.weight_bytes for c in costs)),
            "macs_per_token": _fraction(share.macs_per_token, sum(c.macs_per_token for c in costs)),
        }

    def _share_json(self, share: Share) -> dict[str, Any]:
        return {
            "provider": share.provider,
            "nodes": share.nodes,
            "weight_bytes": share.weight_bytes,
            "macs_per_token": share.macs_per_token,
            "fraction": self._fractions(share),
        }

    def _share_text(self, share: Share) -> str:
        fraction = self._fractions(share)
        text = f"{share.provider}: {share.nodes} of {len(self.nodes)} nodes"
        if share.weight_bytes is not None:
            text += (
                f", {percent(fraction['weight_bytes'])} of the weights"
                f", {percent(fraction['macs_per_token'])} of the work"
            )
        return text


def read_costs(model: Path) -> GraphCosts | None:
    """Return the table of costs in the manifest beside `model`; None if there is none.

    Raises `PackageError` if the table is damaged.
    """
    file = model.parent / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    table = manifest.get("graph") if isinstance(manifest, dict) else None
    if table is None:
        return None
    try:
        nodes = {
            str(name): Cost(int(entry["weight_bytes"]), int(entry["macs_per_token"]))
            for name, entry in table["costs"].items()
        }
        return GraphCosts(int(table["context"]), nodes)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise PackageError(
            f'{file} is damaged: "graph" is not a table of costs; export the package again.'
        ) from None


def place(asked: str, subgraphs: Iterable[Any], costs: GraphCosts | None) -> Placement:
    """Return the placement that a session's `get_provider_graph_assignment_info()` describes."""
    nodes = tuple(
        AssignedNode(node.name, node.op_type, subgraph.ep_name)
        for subgraph in subgraphs
        for node in subgraph.get_nodes()
    )
    return Placement(asked, nodes, costs)


def summarize(nodes: Sequence[AssignedNode]) -> str:
    """Return how many nodes of each operator there are, and on which provider."""
    parts = []
    for provider in dict.fromkeys(node.provider for node in nodes):
        counts = Counter(node.op_type for node in nodes if node.provider == provider)
        operators = ", ".join(f"{count} {op}" for op, count in counts.most_common())
        parts.append(f"{operators} (on {provider})")
    return "; ".join(parts)


def percent(fraction: float | None) -> str:
    """Return a percentage to print: 0.0 % is exactly nothing, and 100.0 % exactly all."""
    if fraction is None:
        return "-"
    if 0 < fraction < 0.001:
        return "< 0.1 %"
    if 0.999 <= fraction < 1:
        return "> 99.9 %"
    return f"{100 * fraction:.1f} %"


def _fraction(part: int | None, whole: int) -> float | None:
    return part / whole if part is not None and whole else None
