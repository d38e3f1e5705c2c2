"""Collect facts from the system, without importing the runtimes in this process."""

from __future__ import annotations

import csv
import locale
import os
import platform
import shutil
import struct
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path
from typing import Any

from llama_onnx.runtime.doctor import linux
from llama_onnx.runtime.doctor.child import run, run_probe
from llama_onnx.runtime.doctor.devices import provider_names
from llama_onnx.runtime.doctor.facts import (
    Disk,
    Encodings,
    Facts,
    Gpu,
    Graphics,
    Libraries,
    Loaded,
    Memory,
    Processor,
    ProviderRun,
    Python,
    Wheels,
    WindowsFacts,
    WindowsML,
)
from llama_onnx.runtime.doctor.int4 import int4_kernels
from llama_onnx.runtime.doctor.requirements import distribution, normalize
from llama_onnx.runtime.placement.wheels import installed_flavours
from llama_onnx.targets.progress import SILENT, Progress
from llama_onnx.targets.providers import PROVIDERS

PROJECT = "llama-onnx"
SMI_SECONDS = 30.0


def gather(*, seconds: float, progress: Progress = SILENT) -> Facts:
    """Collect all facts. What may hang runs in a separate process, for at most `seconds`."""
    progress.step("installed wheels")
    wheels = gather_wheels()
    progress.step("onnxruntime")
    loaded = load("onnxruntime", seconds) if wheels.onnxruntime else Loaded(None)
    progress.step("onnxruntime-genai")
    genai = load("genai", seconds) if wheels.genai else Loaded(None)
    libraries, tried = [], []
    for name in provider_names(sys.platform, loaded.providers):
        progress.step(f"provider {name}")
        if PROVIDERS[name].libraries.get(sys.platform):
            libraries.append(try_libraries(name, seconds))
        tried.append(try_provider(name, seconds))
    progress.step("hardware")
    return Facts(
        platform=sys.platform,
        python=Python(platform.python_version(), struct.calcsize("P") * 8, platform.machine()),
        wheels=wheels,
        onnxruntime=loaded,
        genai=genai,
        libraries=tuple(libraries),
        tried=tuple(tried),
        graphics=gather_graphics(),
        processor=gather_processor(),
        memory=gather_memory(),
        disks=(gather_disk("here", Path.cwd()), gather_disk("temp", _temp_folder())),
        telemetry=os.environ.get("ORT_DISABLE_TELEMETRY"),
        encodings=Encodings(
            sys.stdout.encoding or "ascii",
            locale.getpreferredencoding(False),
            sys.getfilesystemencoding(),
        ),
        windows=_windows(),
        windows_ml=gather_windows_ml(seconds) if sys.platform == "win32" else None,
    )


def gather_wheels() -> Wheels:
    """Return versions and requirements, from the metadata that pip wrote."""
    ort, genai = installed_flavours("onnxruntime"), installed_flavours("onnxruntime_genai")
    extras = _extras(_requires(PROJECT))
    wanted = {distribution(text) for texts in extras.values() for text in texts}
    everything = ((normalize(d.metadata["Name"] or ""), d.version) for d in distributions())
    return Wheels(
        llama_onnx=_version(PROJECT),
        onnxruntime=ort,
        genai=genai,
        requires={name: _requires(name) for name in genai},
        extras=extras,
        others={name: found for name, found in everything if name in wanted},
    )


def load(module: str, seconds: float) -> Loaded:
    """Import "onnxruntime" or "genai" in a separate process."""
    answer = run_probe(module, seconds=seconds)
    return Loaded(
        version=answer.get("version"),
        error=answer.get("error"),
        providers=tuple(answer.get("providers", ())),
    )


def try_libraries(name: str, seconds: float) -> Libraries:
    """Load the libraries of a provider in a separate process."""
    answer = run_probe("libraries", name, seconds=seconds)
    return Libraries(name, **{**answer, "missing": tuple(answer.get("missing", ()))})


def try_provider(name: str, seconds: float) -> ProviderRun:
    """Open and run the small model on a provider, in a separate process."""
    answer = run_probe("open", name, seconds=seconds)
    if "error" in answer:
        return ProviderRun(name, error=answer["error"])
    return ProviderRun(name, **{**answer, "logits": tuple(answer["logits"])})


def gather_windows_ml(seconds: float) -> WindowsML:
    """Register the providers of Windows' catalog in a separate process, and list their devices."""
    if _version("windowsml") is None:
        return WindowsML(installed=False)
    answer = run_probe("windows_ml", seconds=seconds)
    if "error" in answer:
        return WindowsML(installed=True, error=answer["error"])
    return WindowsML(
        installed=True,
        providers=tuple(answer["providers"]),
        devices=tuple(answer["devices"]),
        problems=answer["problems"],
    )


def gather_graphics() -> Graphics:
    """Return display adapters, and what NVIDIA's driver reports about its devices."""
    adapters: tuple[str, ...] = ()
    if sys.platform == "win32":
        from llama_onnx.runtime.doctor import win32

        adapters = win32.adapters()
    elif sys.platform == "linux":
        adapters = linux.adapters()
    driver = linux.nvidia_driver() if sys.platform == "linux" else None
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return Graphics(adapters, driver=driver, error="not found" if driver else None)
    fields = "name,driver_version,memory.total,compute_cap"
    query = [smi, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    outcome = run(query, seconds=SMI_SECONDS)
    return Graphics(adapters, parse_gpus(outcome.stdout), driver, outcome.error)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Parse nvidia-smi's rows: name, driver, memory in MiB, compute capability."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == 4 and row[2].strip().isdecimal():
            name, driver, mebibytes, capability = (cell.strip() for cell in row)
            major, _, minor = capability.partition(".")
            known = major.isdecimal() and minor.isdecimal()
            gpus.append(
                Gpu(
                    name,
                    driver,
                    int(mebibytes) << 20,
                    (int(major), int(minor)) if known else None,
                )
            )
    return tuple(gpus)


def gather_processor() -> Processor:
    """Return name, cores and instruction sets, and how many processors this process may use."""
    logical = os.cpu_count() or 1
    if sys.platform == "win32":
        from llama_onnx.runtime.doctor import win32

        name, cores = win32.processor_name(), win32.physical_cores()
        found = win32.features(platform.machine())
        int4 = int4_kernels(found)
        return Processor(name, cores, logical, logical, features=found, int4=int4)
    elif sys.platform == "linux":  # noqa: RET505  mypy reads past a return, not into other branches
        name = linux.processor_name() or platform.machine()
        allowed, quota = len(os.sched_getaffinity(0)), linux.container_cores()
        cores, found = linux.physical_cores(), linux.features()
        return Processor(name, cores, logical, allowed, quota, found, int4_kernels(found))
    else:
        return Processor(platform.processor() or None, None, logical, logical)


def gather_memory() -> Memory | None:
    """Return the memory of the machine and of the container."""
    if sys.platform == "win32":
        from llama_onnx.runtime.doctor import win32

        machine = win32.memory()
    else:
        machine = linux.memory()
    if machine is None:
        return None
    total, available = machine
    container = linux.container_memory() if sys.platform == "linux" else None
    if container is None:
        return Memory(total, available)
    limit, free = container
    return Memory(total, min(available, free), limit)


def gather_disk(purpose: str, folder: Path) -> Disk:
    """Return the space on the disk of `folder`."""
    usage = shutil.disk_usage(folder)
    return Disk(purpose, str(folder), usage.free, usage.total, os.access(folder, os.W_OK))


def _temp_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # no folder is writable
        return Path(os.environ.get("TMPDIR", os.sep))


def _windows() -> WindowsFacts | None:
    if sys.platform == "win32":
        from llama_onnx.runtime.doctor import win32

        return win32.gather()
    else:  # noqa: RET505  mypy calls what follows a return unreachable on Windows
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requires(name: str) -> tuple[str, ...]:
    try:
        return tuple(requires(name) or ())
    except PackageNotFoundError:
        return ()


def _extras(requirements: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return requirements by extra: 'torch>=2.7; extra == "export"' belongs to "export"."""
    found: dict[str, list[Any]] = {}
    for text in requirements:
        requirement, _, marker = text.partition(";")
        _, is_extra, extra = marker.partition("extra ==")
        if is_extra:
            found.setdefault(extra.strip().strip("\"'"), []).append(requirement.strip())
    return {extra: tuple(texts) for extra, texts in found.items()}
