"""An execution provider, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Library:
    """A shared library, by the name that the loader looks for, and how to install it."""

    name: str
    mend: str


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    `name` is the name on our command line, `ort_name` ONNX Runtime's. `genai_name` is the name in
    onnxruntime-genai's configuration (None: no entry is needed), `device` the one that genai
    reports for an open model; any other value means that it fell back.

    `wheel` and `genai_wheel` are the distributions of onnxruntime and onnxruntime-genai that
    contain it (None: there is no such genai wheel), and `extra` is the extra of this project that
    installs them. Wheels of the same module exclude each other. `platforms` are the values of
    `sys.platform` that have such wheels; `libraries` lists, by platform, the other libraries that
    must load, dependencies first.

    `ort_device` is the device name for values in ONNX Runtime's Python API. `continues`: its
    attention accepts several tokens after a cache that is not empty; otherwise they must be fed one
    by one, and past and present must share one buffer.

    `views`: a graph's inputs and outputs can be bound to a part of a larger value by its address,
    so that one step can serve several rows of a cache.

    `session_options` are onnxruntime-genai's, `provider_options` the provider's own; both apply
    whenever a package is opened. `other_options` are further values that a package may give them.

    `ep_device` chooses one of the devices that ONNX Runtime lists for the provider, by its number
    among them; None: the provider is named, and finds its device itself.
    """

    name: str
    ort_name: str
    genai_name: str | None
    device: str
    wheel: str
    genai_wheel: str | None
    extra: str
    platforms: tuple[str, ...]
    ort_device: str = "cpu"
    continues: bool = True
    views: bool = False
    libraries: Mapping[str, tuple[Library, ...]] = field(default_factory=dict)
    session_options: Mapping[str, int | str] = field(default_factory=dict)
    provider_options: Mapping[str, str] = field(default_factory=dict)
    other_options: Mapping[str, str] = field(default_factory=dict)
    ep_device: int | None = None
