"""The engines that generate text from a package."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown

_Name = TypeVar("_Name", bound=str)

EngineName = Literal["genai", "onnxruntime"]

ENGINES: tuple[EngineName, ...] = ("genai", "onnxruntime")
"""onnxruntime-genai, and our own over plain ONNX Runtime; the default first."""

SpeculationName = Literal["auto", "ngram", "off"]

SPECULATIONS: tuple[SpeculationName, ...] = ("auto", "ngram", "off")
"""When our own engine drafts tokens from the text: where it can, or else an error, or never; the
default first."""


def check_speculation(name: Any) -> SpeculationName:
    """Return when to draft tokens; raise `UsageError` for another name.

    >>> check_speculation("off")
    'off'
    """
    return _one_of(SPECULATIONS, name, "speculation")


def check_engine(name: Any) -> EngineName:
    """Return the name of an engine; raise `UsageError` for another.

    >>> check_engine("genai")
    'genai'
    """
    return _one_of(ENGINES, name, "engine")


def _one_of(known: tuple[_Name, ...], name: Any, what: str) -> _Name:
    for each in known:
        if name == each:
            return each
    raise UsageError(f"there is no {what} {shown(name)}: choose one of {', '.join(known)}.")
