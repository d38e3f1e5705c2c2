"""Makes runtime/doctor/probe-*.onnx, the small int4 Llama that `doctor` runs on each provider.

`python -m tests.support.probe_model` writes it anew; a test holds it to what the exporter makes.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.targets.package import MODEL_FILE
from llama_onnx.targets.registry import get_target
from tests.support import tiny

FOLDER = Path(__file__).parents[2] / "runtime" / "doctor"
FILES = {name: FOLDER / f"probe-{name}.onnx" for name in ("cpu", "cuda", "directml", "webgpu")}
"""Target and provider -> file: each has the operators that its provider can run."""

CONFIG = replace(
    tiny.GQA,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)


def weights() -> dict[str, np.ndarray]:
    """Return weights from integer arithmetic, which does not depend on a random generator."""
    tensors, start = {}, 1
    for name, shape in CONFIG.tensor_shapes().items():
        count = int(np.prod(shape))
        mixed = (np.arange(start, start + count, dtype=np.uint64) * 2654435761) % 2**32
        spread = (mixed >> 16).astype(np.float32) / 2**15 - 1
        start += count
        flat = 1 + spread / 8 if len(shape) == 1 else spread / 4
        tensors[name] = flat.reshape(shape).astype(np.float32)
    return tensors


def make(folder: Path, target: str) -> onnx.ModelProto:
    """Return the model for `target` with its weights inside; `folder` is for intermediate files."""
    source = tiny.write_huggingface(folder / "checkpoint", CONFIG, tensors=weights())
    options = Options(precision="int4", quantizer="rtn")
    result = export_package(source, folder / "package", get_target(target), options)
    model = onnx.load(result.package / MODEL_FILE)
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    return model


if __name__ == "__main__":
    for name, file in FILES.items():
        with tempfile.TemporaryDirectory() as scratch:
            file.write_bytes(make(Path(scratch), name).SerializeToString(deterministic=True))
        print(f"{file}: {file.stat().st_size:,} bytes")
