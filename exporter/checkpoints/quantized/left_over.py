"""A folder whose config still has the settings of bitsandbytes, while its weights are floats.

bitsandbytes quantizes when a model is loaded, and its settings stay in config.json when the model
is merged or dequantized and saved again.
"""

from __future__ import annotations

from dataclasses import replace

from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.targets.errors import UnsupportedError

_STATE = (".absmax", ".quant_map", ".nested_absmax", ".SCB", ".weight_format")
"""Ends of the names of tensors that bitsandbytes saves with codes."""


def without_left_over(plain: HuggingFaceCheckpoint) -> HuggingFaceCheckpoint:
    """Return `plain` with a warning that its quantization settings are ignored.

    Raises `UnsupportedError` if its weights really are codes of bitsandbytes.
    """
    where = plain.path / "config.json"
    for name, tensor in plain.tensors.items():
        if tensor.problem is not None or name.endswith(_STATE):
            raise UnsupportedError(
                f"{where}: the checkpoint is quantized with 'bitsandbytes' ({name}), whose codes "
                "cannot be read: export the original weights, or dequantize() the model and save "
                "it again."
            )
    warning = (
        f"{where} has a quantization_config of bitsandbytes, but the weights are floats: they are "
        "exported as they are."
    )
    return replace(plain, notes=(*plain.notes, warning))
