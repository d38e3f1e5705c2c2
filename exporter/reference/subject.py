"""The subject of a validation: a package and the checkpoint it was made from, both open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from llama_onnx.exporter.checkpoints.folded import folded_like
from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.runtime.measure.graph_session import Adapter
from llama_onnx.targets.package import MODEL_FILE


@dataclass(frozen=True)
class Subject:
    """A package and the checkpoint it was made from. `parity.measure.open_subject` opens both.

    `weights` are the package's weights, dequantized; `original` has the original weights.
    `manifest` is the package's manifest.json, empty for a folder without one.

    With an active LoRA adapter, `adapted_weights` and `adapted_original` are `weights` and
    `original` with the adapter added, and `adapter` has its parameters as inputs of the graph.
    Without an adapter they are `weights` and `original` themselves, and `adapter` is None.
    """

    path: Path
    manifest: Mapping[str, Any]
    weights: PackageCheckpoint
    original: Checkpoint
    adapted_weights: Checkpoint
    adapted_original: Checkpoint
    adapter: Adapter | None = None

    @property
    def rounded_from(self) -> Checkpoint:
        """The original with the package's channel scales folded in: what was rounded."""
        return folded_like(self.path, self.original)

    @property
    def model_path(self) -> Path:
        """The path of the package's graph."""
        return self.path / MODEL_FILE

    def load_graph(self) -> ir.Model:
        """Return a new copy of the graph that the caller may change; the weights stay on disk."""
        return ir.load(self.model_path)
