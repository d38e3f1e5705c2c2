"""The manifest of an exported package: what it was made from, how, and with what."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from llama_onnx.exporter.checkpoints.hub import hub_origin, source_name
from llama_onnx.exporter.checkpoints.lora import adapters_of
from llama_onnx.exporter.graph.costs import graph_costs
from llama_onnx.exporter.packaging.job import Job
from llama_onnx.runtime import ort

_TOOLS = ("llama-onnx", "onnx-ir", "onnxscript", "numpy")


def manifest_content(job: Job) -> dict[str, Any]:
    """Return the content of the manifest, except format version and files."""
    plan = job.plan
    # onnxruntime's distribution has another name in each flavor.
    tools = {name: version(name) for name in _TOOLS} | {"onnxruntime": ort.version()}
    return {
        "created_with": tools,
        "target": job.target.name,
        "precision": plan.recipe.precision,
        "recipe": plan.recipe.to_json(),
        "calibration": plan.calibration.to_json() if plan.calibration else None,
        "source": _source(job),
        "adapters": {adapter.name: adapter.describe() for adapter in job.kept},
        "config": asdict(job.checkpoint.config),
        "tokenizer": job.tokenizer,
        "graph": graph_costs(plan.built),
        "structure": plan.structure.to_json() if plan.structure else None,
    }


def _source(job: Job) -> dict[str, Any]:
    checkpoint = job.checkpoint
    origin = hub_origin(checkpoint.path)
    return {
        "format": checkpoint.format,
        "name": source_name(checkpoint.path),
        **({"commit": origin.commit} if origin else {}),
        "adapters": [folder.name for folder in adapters_of(checkpoint)],
        "files": checkpoint.fingerprint(),
        "hashes": job.hashes,
    }
