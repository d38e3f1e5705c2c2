"""Checks that a package and a checkpoint have the same architecture."""

from __future__ import annotations

from llama_onnx.exporter.checkpoints.package.package import PackageCheckpoint
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.targets.errors import UsageError

# Fields that change the model's results; special tokens and context length do not.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
)


def check_same_model(package: PackageCheckpoint, original: Checkpoint) -> None:
    """Raise `UsageError` unless `package` and `original` have the same architecture and sizes."""
    for key in _SAME:
        found, expected = getattr(package.config, key), getattr(original.config, key)
        if found != expected:
            raise UsageError(
                f"{package.path} was not made from {original.path}: {key} is {found} in the "
                f"package and {expected} in the checkpoint."
            )
