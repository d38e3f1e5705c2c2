"""The result types of the public functions, for their annotations.

Each is imported when it is first read, so that `typing.get_type_hints` can resolve
`_results.Plan` while importing `llama_onnx` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_onnx.exporter.packaging.export import ExportResult as ExportResult
    from llama_onnx.exporter.packaging.plan import Plan as Plan
    from llama_onnx.exporter.parity.measure.report import ParityReport as ParityReport
    from llama_onnx.runtime.measure.verify import VerifyReport as VerifyReport
else:
    _MODULES = {
        "ExportResult": "llama_onnx.exporter.packaging.export",
        "ParityReport": "llama_onnx.exporter.parity.measure.report",
        "Plan": "llama_onnx.exporter.packaging.plan",
        "VerifyReport": "llama_onnx.runtime.measure.verify",
    }

    def __getattr__(name: str) -> Any:
        """Import the result type called `name`."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
