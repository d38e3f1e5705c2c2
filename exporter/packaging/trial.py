"""A trial of a finished package: its graph is opened and runs a prefill and a decode step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.packaging.adapters import read_parameters
from llama_onnx.exporter.reference.segments import run_segments
from llama_onnx.runtime import ort
from llama_onnx.runtime.measure.situations import Passage, decode
from llama_onnx.targets.errors import LlamaOnnxError, PackageError
from llama_onnx.targets.package import MODEL_FILE

WITHOUT_KERNELS = ("bf16",)
"""Types of activations that ONNX Runtime's CPU provider has no kernels for and does not cast."""


def try_package(
    folder: Path, config: LlamaConfig, adapters: Sequence[str] = (), *, exact: bool = False
) -> None:
    """Open the graph in `folder` and run a prefill of four tokens and a decode step: of the base,
    then with each of `adapters` (files of the package) in turn.

    `exact` computes in float32, for activations that the CPU has no kernels for.

    Raises `PackageError` when ONNX Runtime refuses the graph or a value is not finite. Bounded
    memory: the whole graph is opened without its weights, then run piece by piece.
    """
    ids = np.arange(1, 6, dtype=np.int64) % config.vocab_size  # [5]
    program = decode([Passage(ids, prompt=4)])
    logits: Mapping[str, Any] = {}
    model = folder / MODEL_FILE
    try:
        if not exact:
            ort.check_opens(model)
        for file in (None, *adapters):
            active = read_parameters(folder / file) if file else None
            for label, steps in run_segments(model, program, config, exact=exact, adapter=active):
                for outputs in steps:
                    _require_finite(outputs, f"{label}, {file}" if file else label)
                    logits = outputs
    except Exception as error:
        if isinstance(error, LlamaOnnxError):
            raise
        raise PackageError(f"ONNX Runtime does not run the finished graph: {error}") from error
    if logits["logits"].shape != (1, 1, config.vocab_size):
        raise PackageError(f"the finished graph gives logits of shape {logits['logits'].shape}.")


def _require_finite(outputs: Mapping[str, Any], label: str) -> None:
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise PackageError(
                f"a test step gives NaN or infinity in {name} ({label}): the weights overflow."
            )
