"""What tuned settings hold for: a processor, what of it may be used, and a runtime."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from llama_onnx.runtime import ort
from llama_onnx.runtime.doctor.gather import gather_processor


@dataclass(frozen=True)
class Machine:
    """A processor and its instruction sets, the cores that this process may use, and onnxruntime's
    version. `cores` are the physical ones, None where they are not known."""

    processor: str
    features: tuple[str, ...]
    cores: int | None
    allowed: float
    onnxruntime: str

    @property
    def key(self) -> str:
        """A name for files, which no other machine has."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {**asdict(self), "features": list(self.features)}


@cache
def this_machine() -> Machine:
    """Return what this process runs on."""
    found = gather_processor()
    features = sorted(name for name, there in found.features.items() if there)
    return Machine(
        found.name or platform.machine(),
        tuple(features),
        found.physical_cores,
        found.usable,
        ort.version(),
    )
