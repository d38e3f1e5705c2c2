"""Open a package in onnxruntime-genai, and check that the requested provider is in use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.runtime.genai import og
from llama_onnx.runtime.memory import is_memory_failure
from llama_onnx.runtime.ort import check_threads
from llama_onnx.runtime.placement.availability import require
from llama_onnx.targets.errors import PackageError, ProviderError, ResourceError
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU


@dataclass(frozen=True)
class OpenModel:
    """A model open in genai on `provider`; `asked` is the requested provider.

    `fallback` is the reason why the two differ, None if they do not. Nothing is `tuned` here.
    """

    model: Any
    provider: Provider
    asked: Provider
    fallback: str | None = None
    tuned: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what runs the model, and how that was verified."""
        return {
            "name": self.provider.name,
            "asked": self.asked.name,
            "onnxruntime": self.provider.ort_name,
            "device": str(self.model.device_type),
            "fallback": self.fallback,
            "verified": _verified(self.provider),
        }


def open_model(
    folder: Path,
    provider: Provider,
    *,
    threads: int | None = None,
    allow_fallback: bool = False,
) -> OpenModel:
    """Open the model in `folder` on `provider`, with `threads` threads if given.

    Raises `ProviderError` if the provider cannot run it, unless `allow_fallback`: then the CPU
    runs it, and the result has the reason. Raises `PackageError` if the model does not open, and
    `UsageError` for a number of threads that makes no sense.
    """
    try:
        require(provider, genai=True)
        return OpenModel(_open(folder, provider, threads), provider, provider)
    except ProviderError as error:
        if not allow_fallback:
            raise
        return OpenModel(_open(folder, CPU, threads), CPU, provider, str(error))


def _open(folder: Path, provider: Provider, threads: int | None) -> Any:
    try:
        model = og.Model(_configure(folder, provider, threads))
    except (RuntimeError, MemoryError) as error:
        if is_memory_failure(error):
            raise ResourceError(
                f"there is not enough memory to open {folder}: close other programs, or export the "
                "model with a smaller precision."
            ) from None
        reason = " ".join(str(error).split())
        if provider == CPU:
            raise PackageError(f"{folder} does not open in onnxruntime-genai: {reason}") from None
        raise ProviderError(
            f"{folder} does not open in onnxruntime-genai on {provider.name}: "
            f"{reason.rstrip('.')}; pass --provider cpu to use the CPU."
        ) from None
    if str(model.device_type).casefold() != provider.device.casefold():
        raise ProviderError(
            f"onnxruntime-genai opened {folder} on {model.device_type} instead of "
            f"{provider.ort_name}; check that {provider.genai_wheel} is installed."
        )
    return model


def _configure(folder: Path, provider: Provider, threads: int | None) -> Any:
    config = og.Config(str(folder))
    config.clear_providers()
    if provider.genai_name is not None:
        config.append_provider(provider.genai_name)
        for key, value in provider.provider_options.items():
            config.set_provider_option(provider.genai_name, key, value)
    options = session_options(provider, threads)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return config


def session_options(provider: Provider, threads: int | None) -> dict[str, int | str]:
    """Return genai's session options for a provider, with `threads` if given."""
    if threads is None:
        return dict(provider.session_options)
    return {**provider.session_options, "intra_op_num_threads": check_threads(threads)}


def _verified(provider: Provider) -> str:
    if provider == CPU:
        return "it is the only provider in the session"
    return (
        "onnxruntime-genai reports its device but not where each node runs: "
        f"`llama-onnx inspect PACKAGE --provider {provider.name}` shows that"
    )
