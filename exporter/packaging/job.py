"""What every step of one export needs to know."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_onnx.exporter.formats.tensor import file_fingerprint
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.adapters import KeptAdapter
from llama_onnx.exporter.packaging.plan import Plan
from llama_onnx.targets.progress import Progress
from llama_onnx.targets.target import Target


@dataclass(frozen=True)
class Job:
    """One export of `checkpoint` to `folder` for `target`, according to `plan`.

    `hashes` are those of the source's files, as in the manifest; without `tokenizer`, the
    package takes token ids only; `workers` is the number of threads that convert weights.
    """

    checkpoint: Checkpoint
    kept: tuple[KeptAdapter, ...]
    hashes: dict[str, Any] | None
    target: Target
    plan: Plan
    folder: Path
    workers: int
    progress: Progress
    tokenizer: bool = True

    def _calibration(self) -> dict[str, Any] | None:
        wanted = self.plan.calibration
        if wanted is None:
            return None
        text = file_fingerprint([wanted.text]) if wanted.text else {}
        return {**wanted.to_json(), "files": text}

    def identity(self) -> dict[str, Any]:
        """Return what must not have changed when an export is resumed; errors name its keys."""
        return {
            "version": version("llama-onnx"),
            "source": self.checkpoint.fingerprint(),
            "adapters": {adapter.name: adapter.fingerprint() for adapter in self.kept},
            "target": self.target.name,
            "options": self.plan.recipe.to_json(),
            "config": asdict(self.checkpoint.config),
            "tokenizer": self.tokenizer,
            "calibration": self._calibration(),
        }
