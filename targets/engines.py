"""The engines that generate text from a package."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.printable import shown
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU

_Name = TypeVar("_Name", bound=str)

EngineName = Literal["onnxruntime", "genai"]

ENGINES: tuple[EngineName, ...] = ("onnxruntime", "genai")
"""Our own engine over plain ONNX Runtime, and onnxruntime-genai."""

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


def engine_for(provider: Provider) -> EngineName:
    """Return the engine that generates on `provider` unless another is requested.

    Ours on the CPU, where it was measured to be as fast and remembers what it has read. Elsewhere
    genai, which is faster with one answer at a time.
    """
    return "onnxruntime" if provider == CPU else "genai"


def _one_of(known: tuple[_Name, ...], name: Any, what: str) -> _Name:
    for each in known:
        if name == each:
            return each
    raise UsageError(f"there is no {what} {shown(name)}: choose one of {', '.join(known)}.")
