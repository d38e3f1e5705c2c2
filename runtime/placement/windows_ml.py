"""Windows ML: the execution providers in Windows' catalog, and the devices that they drive.

`windowsml` (Microsoft's package on PyPI, Windows only) lists the providers that suit this machine
and where their libraries are; ONNX Runtime registers a library, and then lists its devices. This
has never run on Windows: tests use a stand-in with the same interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from llama_onnx.runtime import ort
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU, CUDA, DIRECTML, WEBGPU, provider_of

READY, NOT_READY, NOT_PRESENT = "Ready", "NotReady", "NotPresent"
"""Names in `windowsml.EpReadyState`: usable, installed, to be downloaded."""

_VENDORS = (
    "NvTensorRTRTXExecutionProvider",
    "MIGraphXExecutionProvider",
    "OpenVINOExecutionProvider",
    "QNNExecutionProvider",
    "VitisAIExecutionProvider",
)
_SUITED: Mapping[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("NvTensorRTRTXExecutionProvider", CUDA.ort_name),
    "directml": (*_VENDORS, DIRECTML.ort_name),
    "webgpu": (WEBGPU.ort_name,),
    "portable": _VENDORS,
}
"""Target -> the providers that may compute its graph, the best first. DirectML, which Microsoft
only maintains, is after those of the vendors; the CPU comes after all."""

_KINDS = ("GPU", "NPU", "CPU")


@dataclass(frozen=True)
class CatalogEntry:
    """A provider in Windows' catalog; `state` is one of READY, NOT_READY and NOT_PRESENT."""

    name: str
    version: str
    library: str
    state: str
    certified: bool


@dataclass(frozen=True)
class Device:
    """A device that ONNX Runtime lists for the provider `ep`, with its `number` among those.

    `kind` is CPU, GPU or NPU. `details` are all facts by which a device is known again: ids, and
    what provider and system say, the provider's version for example.
    """

    ep: str
    number: int
    kind: str
    vendor: str
    details: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.ep} on {self.kind} {self.vendor}".rstrip()


def read_catalog(*, download: bool = False) -> tuple[CatalogEntry, ...]:
    """Return the providers in Windows' catalog, made ready; () if `windowsml` is not there.

    `download` lets Windows download those that are not on the machine. One that cannot be made
    ready keeps its state.
    """
    try:
        windowsml: Any = importlib.import_module("windowsml")
    except (ImportError, OSError):  # not installed; on other systems; without its DLL
        return ()
    found = []
    with windowsml.EpCatalog() as catalog:
        for entry in catalog.find_all_providers():
            state = entry.ready_state.name
            if state == NOT_READY or (state == NOT_PRESENT and download):
                with suppress(OSError):
                    entry.ensure_ready()
                state = entry.ready_state.name
            certified = entry.certification.name == "Certified"
            library = entry.library_path if state == READY else ""
            found.append(CatalogEntry(entry.name, entry.version, library, state, certified))
    return tuple(found)


def register(entries: Sequence[CatalogEntry], runtime: Any = None) -> dict[str, str]:
    """Register the libraries of certified providers that are ready with ONNX Runtime.

    Return the reasons why others were not, by name. Do it once in a process: those whose devices
    ONNX Runtime lists already are left alone.
    """
    runtime = runtime or ort.load()
    there = {device.ep_name for device in runtime.get_ep_devices()}
    problems = {}
    for entry in entries:
        if entry.name in there:
            continue
        if not entry.certified:
            problems[entry.name] = "Windows does not call it certified"
        elif entry.state != READY or not entry.library:
            problems[entry.name] = "it is not installed"
        else:
            try:
                runtime.register_execution_provider_library(entry.name, entry.library)
            except Exception as error:  # onnxruntime's exceptions have no common base class
                problems[entry.name] = ort.first_line(error)
    return problems


def list_devices(runtime: Any = None) -> tuple[Device, ...]:
    """Return all devices of all registered providers, in ONNX Runtime's order."""
    return tuple(_devices((runtime or ort.load()).get_ep_devices()))


def _devices(found: Sequence[Any]) -> Iterator[Device]:
    numbers: dict[str, int] = {}
    for entry in found:
        number = numbers.setdefault(entry.ep_name, 0)
        numbers[entry.ep_name] += 1
        hardware = entry.device
        details = {
            "device_id": hardware.device_id,
            "vendor_id": hardware.vendor_id,
            "ep_vendor": entry.ep_vendor,
            **{f"ep {name}": value for name, value in entry.ep_metadata.items()},
            **{f"hardware {name}": value for name, value in hardware.metadata.items()},
        }
        texts = tuple(sorted((name, str(value)) for name, value in details.items()))
        yield Device(entry.ep_name, number, hardware.type.name, hardware.vendor, texts)


def rank(target: str, devices: Sequence[Device]) -> list[Device]:
    """Return the devices that may run a package for `target`, the most promising first.

    Those of a GPU come before those of an NPU, and within a kind in the order of the providers.
    The CPU's own provider is always the last.
    """
    order = _SUITED.get(target, ())
    suited = [device for device in devices if device.ep in order]
    own = [device for device in devices if device.ep == CPU.ort_name]
    suited.sort(key=lambda device: (_KINDS.index(device.kind), order.index(device.ep)))
    return suited + own


def provider_on(device: Device) -> Provider:
    """Return the provider that runs graphs on exactly this device."""
    known = provider_of(device.ep)
    if known is None:  # as careful as with DirectML, and without its options
        name = device.ep.removesuffix("ExecutionProvider").lower()
        return replace(
            DIRECTML,
            name=name,
            ort_name=device.ep,
            genai_name=None,
            device=name,
            libraries={},
            provider_options={},
            other_options={},
            ort_device="cpu",
            ep_device=device.number,
        )
    # Which device it is, ONNX Runtime tells the provider itself.
    options = {name: value for name, value in known.provider_options.items() if name != "device_id"}
    return replace(known, provider_options=options, ep_device=device.number)
