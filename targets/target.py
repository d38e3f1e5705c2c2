"""A target: what the exporter must emit for a place to run, and how the runtime opens it there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_onnx.targets.provider import Provider


@dataclass(frozen=True)
class Graph:
    """What the exporter emits. Data, passed as an argument to whoever builds the graph.

    `precisions` are what the weights can be stored in; `activation_dtype` is what flows between the
    operators whatever the weights are. `accuracy_level` is `MatMulNBits`' own: 4 computes in int8,
    1 in fp32.
    """

    precisions: tuple[str, ...]
    default_precision: str
    activation_dtype: str = "fp32"
    accuracy_level: int = 4


@dataclass(frozen=True)
class Session:
    """How the runtime opens a package: the provider, and what this target asks beyond its options.

    `options` are onnxruntime-genai's session options.
    """

    provider: Provider
    options: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A place where a package runs."""

    name: str
    description: str
    graph: Graph
    session: Session
