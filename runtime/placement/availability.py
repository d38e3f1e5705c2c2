"""Check whether a provider can run on this machine; if not, report why, and what to do."""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
from collections.abc import Collection, Mapping

from llama_onnx.runtime import ort
from llama_onnx.runtime.placement.wheels import install_wheels, installed_flavours
from llama_onnx.targets.errors import ProviderError
from llama_onnx.targets.provider import Library, Provider
from llama_onnx.targets.providers import CPU

_SYSTEMS = {"linux": "Linux", "win32": "Windows", "darwin": "macOS"}


def require(provider: Provider, *, genai: bool = False) -> None:
    """Raise `ProviderError` if `provider` cannot run here.

    `genai`: onnxruntime-genai must run it too, not only ONNX Runtime. Loads the provider's
    libraries, including those in NVIDIA's wheels, which neither runtime searches.
    """
    if provider == CPU or provider.ep_device is not None:  # ONNX Runtime lists the device
        return
    reason = (
        _wrong_platform(provider)
        or _no_genai(provider, genai)
        or _clash(provider, installed_flavours("onnxruntime"))
        or _no_wheel(provider, installed_flavours("onnxruntime"), ort.available_providers())
        or _clash(provider, installed_flavours("onnxruntime_genai") if genai else {})
        or _no_libraries(provider, missing_libraries(provider))
    )
    if reason:
        raise ProviderError(f"provider {provider.name} cannot run here: {reason}.")


def missing_libraries(provider: Provider) -> tuple[Library, ...]:
    """Return those of the provider's libraries that do not load on this machine."""
    wanted = provider.libraries.get(sys.platform, ())
    if wanted:
        # It prints what it does not find; our own error lists that.
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_libraries()
    return tuple(library for library in wanted if not _loads(library.name))


def _wrong_platform(provider: Provider) -> str | None:
    if sys.platform in provider.platforms:
        return None
    here = _SYSTEMS.get(sys.platform, sys.platform)
    there = " and ".join(_SYSTEMS[platform] for platform in provider.platforms)
    return f"its wheels exist for {there}, and this is {here}; pass --provider cpu"


def _no_genai(provider: Provider, genai: bool) -> str | None:
    if not genai or provider.genai_wheel is not None:
        return None
    return "there is no onnxruntime-genai for it; pass another --provider"


def _clash(provider: Provider, flavours: Mapping[str, str]) -> str | None:
    if len(flavours) < 2:
        return None
    return (
        f"{' and '.join(sorted(flavours))} are installed at once and overwrite each other's files; "
        f"{_replace(provider)}"
    )


def _no_wheel(
    provider: Provider, flavours: Mapping[str, str], available: Collection[str]
) -> str | None:
    if provider.ort_name in available:
        return None
    there = " ".join(f"{name} {version}" for name, version in flavours.items())
    return (
        f"it needs the wheel {provider.wheel}, and {there or 'another onnxruntime'} is installed; "
        f"{_replace(provider)}"
    )


def _replace(provider: Provider) -> str:
    both = {**installed_flavours("onnxruntime"), **installed_flavours("onnxruntime_genai")}
    return install_wheels(provider, both)


def _no_libraries(provider: Provider, missing: Collection[Library]) -> str | None:
    if not missing:
        return None
    names = ", ".join(library.name for library in missing)
    mends = ", and ".join(dict.fromkeys(library.mend for library in missing))
    return f"{names} cannot be loaded; {mends}"


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
