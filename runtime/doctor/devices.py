"""Judge providers by how they ran, and graphics hardware by its driver and libraries."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from llama_onnx.runtime.doctor.facts import (
    Facts,
    Graphics,
    Libraries,
    Loaded,
    ProviderRun,
    Wheels,
    WindowsML,
)
from llama_onnx.runtime.doctor.finding import Finding, Status
from llama_onnx.runtime.doctor.requirements import numbers
from llama_onnx.runtime.placement.wheels import install_wheels
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU, CUDA, PROVIDERS

CUDA_DRIVER = (580,)
CUDA_CAPABILITY = (7, 5)
"""The oldest driver and compute capability that CUDA 13 supports; onnxruntime-gpu 1.31 needs it."""

SAME = 0.1
"""Largest relative L2 difference between two providers' logits that counts as the same. Int8
activations, which only some providers use, cause 0.03; wrong results cause more than 1."""


def judge_devices(facts: Facts) -> Iterator[Finding]:
    """Yield findings about graphics hardware, its libraries and each provider."""
    loaded, graphics = facts.onnxruntime, facts.graphics
    yield judge_graphics(graphics, cuda=CUDA.ort_name in loaded.providers, platform=facts.platform)
    yield from (judge_libraries(libraries, facts.platform) for libraries in facts.libraries)
    if not loaded.error:
        lacking = {entry.provider for entry in facts.libraries if entry.missing or entry.error}
        yield from judge_tried(facts.tried, facts.wheels, lacking)
        if hint := judge_unused(graphics, loaded, facts.wheels):
            yield hint
    if facts.windows_ml:
        yield judge_windows_ml(facts.windows_ml)


def judge_graphics(graphics: Graphics, *, cuda: bool, platform: str) -> Finding:
    """Judge the devices and their driver; `cuda`: the installed onnxruntime needs NVIDIA's."""
    name = "graphics"
    seen = ", ".join(graphics.adapters)
    if graphics.gpus:
        return _judge_gpus(graphics, cuda)
    if not has_nvidia(graphics) and not graphics.driver:
        return Finding(name, "ok", seen or "no device found: models run on the CPU")
    if graphics.driver:
        why = graphics.error or "it lists no device"
        found = f"NVIDIA's driver {graphics.driver}, but nvidia-smi fails: {why}"
        mend = "reinstall NVIDIA's driver and restart; in a container, expose the device: "
        return Finding(name, "warning", found, mend + "`docker run --gpus all`")
    mend = "install NVIDIA's driver from https://www.nvidia.com/drivers"
    if platform == "linux":
        mend += "; in a container, expose the device: `docker run --gpus all`"
    return Finding(name, "warning", f"{seen}, without NVIDIA's driver", mend)


def has_nvidia(graphics: Graphics) -> bool:
    """Whether there is an NVIDIA device, with or without its driver."""
    return bool(graphics.gpus) or any("NVIDIA" in adapter for adapter in graphics.adapters)


def judge_libraries(tried: Libraries, platform: str) -> Finding:
    """Judge whether the libraries that a provider is linked with can be loaded."""
    name, missing = f"{tried.provider} libraries", tried.missing
    libraries = PROVIDERS[tried.provider].libraries.get(platform, ())
    if tried.error:
        mend = "reinstall the graphics driver and restart"
        return Finding(name, "trouble", f"loading them failed: {tried.error}", mend)
    there = [library.name for library in libraries if library.name not in missing]
    found = f"{len(there)} of {len(libraries)} load"
    if tried.cudnn is not None:
        found += f"; cuDNN 9 {'too' if tried.cudnn else 'does not, but no Llama needs it'}"
    if not missing:
        return Finding(name, "ok", found)
    mends = dict.fromkeys(entry.mend for entry in libraries if entry.name in missing)
    return Finding(name, "trouble", f"{found}; missing: {', '.join(missing)}", ", and ".join(mends))


def judge_tried(
    tried: Sequence[ProviderRun], wheels: Wheels, lacking: Collection[str] = ()
) -> Iterator[Finding]:
    """Yield a finding for each provider: whether it runs, and gives the same results as the CPU.

    `lacking` are the providers whose libraries are missing, which another finding reports.
    """
    cpu = next((entry.logits for entry in tried if entry.provider == CPU.name), ())
    for entry in tried:
        short = entry.error and entry.provider in lacking
        reported = replace(entry, error="does not run without its libraries") if short else entry
        yield _judge_one(reported, cpu, wheels)


def judge_windows_ml(found: WindowsML) -> Finding:
    """Name the devices that the providers in Windows ML's catalog drive."""
    name = "Windows ML"
    if not found.installed:
        mend = "to use the graphics vendors' own providers, run `python -m pip install windowsml`"
        return Finding(name, "ok", "not installed", mend)
    if found.error:
        mend = "update Windows, and run `python -m pip install --upgrade windowsml`"
        return Finding(name, "warning", found.error, mend)
    problems = "; ".join(f"{ep}: {problem}" for ep, problem in found.problems.items())
    if found.devices or not found.providers:
        text = ", ".join(found.devices) or "no provider in its catalog suits this machine"
        return Finding(name, "ok", f"{text}; {problems}" if problems else text)
    mend = "install the provider with Windows Update, or update the device's driver"
    return Finding(name, "warning", f"no device; {problems}" if problems else "no device", mend)


def judge_unused(graphics: Graphics, loaded: Loaded, wheels: Wheels) -> Finding | None:
    """Report an NVIDIA device that the installed wheels do not use, and how to use it."""
    if not has_nvidia(graphics) or CUDA.ort_name in loaded.providers:
        return None
    install = install_wheels(CUDA, {**wheels.onnxruntime, **wheels.genai})
    found = "there is an NVIDIA device, but the installed wheels are for another provider"
    return Finding(f"provider {CUDA.name}", "warning", found, f"to use it, {install}")


def _judge_gpus(graphics: Graphics, cuda: bool) -> Finding:
    name = "graphics"
    devices = ", ".join(f"{gpu.name} ({gpu.memory / 1e9:.1f} GB)" for gpu in graphics.gpus)
    driver = graphics.gpus[0].driver
    found = f"{devices}, driver {driver}"
    status: Status = "trouble" if cuda else "warning"
    if numbers(driver) < CUDA_DRIVER:
        needed = f"CUDA 13 needs {CUDA_DRIVER[0]} or newer"
        mend = "install a newer driver from https://www.nvidia.com/drivers"
        return Finding(name, status, f"{found}: {needed}", mend)
    old = [gpu.name for gpu in graphics.gpus if gpu.capability and gpu.capability < CUDA_CAPABILITY]
    if len(old) == len(graphics.gpus):
        oldest = ".".join(map(str, CUDA_CAPABILITY))
        too_old = f"{found}: CUDA 13 needs compute capability {oldest}"
        return Finding(name, status, too_old, "pass `--provider cpu`")
    return Finding(name, "ok", found)


def _judge_one(tried: ProviderRun, expected: Sequence[float], wheels: Wheels) -> Finding:
    name, provider = f"provider {tried.provider}", PROVIDERS[tried.provider]
    if tried.error:
        return Finding(name, "trouble", tried.error, _remedy(provider, wheels))
    if wrong := _wrong(tried.logits, expected):
        mend = "update the graphics driver; until that helps, pass `--provider cpu`"
        return Finding(name, "trouble", wrong, _remedy(CPU, wheels) if provider == CPU else mend)
    on = f"{tried.nodes - tried.elsewhere} of {tried.nodes} nodes"
    found = f"runs an int4 Llama: {on}, opened and run in {tried.seconds:.2g} s"
    return Finding(name, "ok", found)


def _wrong(logits: Sequence[float], cpu: Sequence[float]) -> str | None:
    """Return what is wrong with `logits`; `cpu` are those of the CPU, () if there are none."""
    if not all(map(math.isfinite, logits)):
        return "runs, but its logits hold NaN or infinity"
    if not cpu:
        return None
    apart = math.dist(logits, cpu) / math.hypot(*cpu)
    if apart <= SAME:
        return None
    return f"runs, but its logits differ from the CPU's: relative L2 {apart:.2g}"


def _remedy(provider: Provider, wheels: Wheels) -> str:
    if provider != CPU:
        return "fix the libraries or the driver above, or pass `--provider cpu`"
    return install_wheels(CPU, {**wheels.onnxruntime, **wheels.genai})


def provider_names(platform: str, available: Sequence[str]) -> tuple[str, ...]:
    """Return our names of the providers that onnxruntime reports, the CPU first."""
    known: Mapping[str, Provider] = PROVIDERS
    return tuple(
        name
        for name, provider in known.items()
        if provider.ort_name in available and platform in provider.platforms
    )
