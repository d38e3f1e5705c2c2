"""Which systems are compared, as data."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.rows import BUILDER, LLAMA, OPENVINO, OURS, ROWS, Row
from benchmarks.quality.workspace import Workspace


@dataclass(frozen=True)
class System:
    """A model as a runtime opens it; `row` makes it, None for the source itself."""

    name: str
    label: str
    runtime: str
    row: Row | None = None

    def path(self, work: Workspace) -> Path:
        """The folder or file to open."""
        return work.source if self.row is None else self.row.path(work)

    def python(self, work: Workspace) -> Path:
        """The interpreter that runs it."""
        return Path(sys.executable) if self.row is None else self.row.python(work)

    def bytes(self, work: Workspace) -> int:
        """The bytes of its weights."""
        files = [self.path(work) / "model.safetensors"]
        if self.row is not None:
            files = self.row.counted(work)
        return sum(file.stat().st_size for file in files)

    def step_bytes(self, work: Workspace) -> int:
        """What a step reads of them: all, as SmolLM2's head is its embedding."""
        return self.bytes(work)


_RUNTIMES = {
    OURS: "our engine",
    BUILDER: "onnxruntime-genai",
    LLAMA: "llama.cpp",
    OPENVINO: "OpenVINO",
}


def _system(name: str) -> System:
    row = ROWS[name]
    runtime = "engine" if row.group == OURS else row.runtime
    group = "" if row.group in (LLAMA, OPENVINO) else f"{row.group} "
    return System(name, f"{group}{row.label}, {_RUNTIMES[row.group]}", runtime, row)


SYSTEMS = (
    _system("awq"),
    _system("preset-small"),
    _system("preset-fast"),
    System(
        "preset-fast-int8-prompts",
        "llama-onnx fast, int8 prompts, our engine",
        "engine_int8_prompts",
        ROWS["preset-fast"],
    ),
    _system("builder-default"),
    _system("builder-k-quant-mixed"),
    _system("q4_0"),
    _system("q4_k_m"),
    _system("openvino-asym-g64-awq"),
    System("pytorch", "source in fp32, PyTorch", "pytorch"),
)
"""The first is what the others are compared with."""
