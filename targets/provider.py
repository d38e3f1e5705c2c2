"""An execution provider: everything known about one, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Library:
    """A shared library by the name the loader is asked for, and what a person does to have it."""

    name: str
    mend: str


@dataclass(frozen=True)
class Provider:
    """What runs the operators.

    `name` is what people write, `ort_name` ONNX Runtime's name. `genai_name` is the one that
    onnxruntime-genai's configuration uses (None: it needs no entry), `device` what genai reports
    of an open model: anything else means that it fell back.

    `wheel` and `genai_wheel` are the distributions of onnxruntime and onnxruntime-genai that carry
    it (None: no genai fits), `extra` this project's optional dependency that brings them; wheels of
    one module exclude each other. `platforms` are the values
    of `sys.platform` the wheels exist for, `libraries` what must load there besides, by platform,
    each after what it needs.

    `ort_device` is where ONNX Runtime's Python puts a value for it. `continues`: its attention
    takes several tokens behind a cache that holds some already; otherwise these must come one by
    one, and past and present must be one buffer.

    `session_options` are onnxruntime-genai's, `provider_options` the provider's own, wherever a
    package is opened.
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
    libraries: Mapping[str, tuple[Library, ...]] = field(default_factory=dict)
    session_options: Mapping[str, int | str] = field(default_factory=dict)
    provider_options: Mapping[str, str] = field(default_factory=dict)
