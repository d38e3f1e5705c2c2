"""The engines that generate text from a package."""

from __future__ import annotations

from typing import Any, Literal

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

EngineName = Literal["genai", "onnxruntime"]

ENGINES: tuple[EngineName, ...] = ("genai", "onnxruntime")
"""onnxruntime-genai, and our own over plain ONNX Runtime; the default first."""


def check_engine(name: Any) -> EngineName:
    """Return the name of an engine; raise `UsageError` for another.

    >>> check_engine("genai")
    'genai'
    """
    for known in ENGINES:
        if name == known:
            return known
    raise UsageError(f"there is no engine {shown(name)}: choose one of {', '.join(ENGINES)}.")
