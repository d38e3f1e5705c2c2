"""The only module that imports onnxruntime-genai: import `og` from here; its usage reports are off.

Set ORT_DISABLE_TELEMETRY=0 to turn them on.
"""

from __future__ import annotations

from llama_onnx.runtime.ort import disable_telemetry
from llama_onnx.targets.extras import missing_extra

_quiet = disable_telemetry()

try:
    import onnxruntime_genai as og
except ModuleNotFoundError as error:
    raise missing_extra("running a package", error.name, "cpu") from None

if _quiet and hasattr(og, "disable_telemetry_events"):
    og.disable_telemetry_events()

__all__ = ["og"]
