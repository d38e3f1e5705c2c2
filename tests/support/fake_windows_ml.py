"""Stand-ins for Windows ML where it cannot run: `windowsml` 2.5.96 and onnxruntime's devices.

Names and behavior are those of the wheel `windowsml` (its Python is a thin layer over a DLL), and
of `OrtEpDevice` and `OrtHardwareDevice` in onnxruntime 1.32; a test compares the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType, TracebackType


class EpReadyState(IntEnum):
    Ready = 0
    NotReady = 1
    NotPresent = 2


class EpCertification(IntEnum):
    Unknown = 0
    Certified = 1
    Uncertified = 2


@dataclass
class ExecutionProvider:
    """An entry of the catalog; `breaks`: Windows cannot make it ready."""

    name: str
    ready_state: EpReadyState = EpReadyState.Ready
    certification: EpCertification = EpCertification.Certified
    version: str = "1.8.63.0"
    breaks: bool = False
    asked: int = 0

    @property
    def library_path(self) -> str:
        ready = self.ready_state == EpReadyState.Ready
        return rf"C:\Program Files\WindowsApps\{self.name}.dll" if ready else ""

    def ensure_ready(self) -> None:
        self.asked += 1
        if self.breaks:
            raise OSError("[WinError -2147009780] the package cannot be installed")
        self.ready_state = EpReadyState.Ready


def fake_windowsml(entries: Sequence[ExecutionProvider]) -> ModuleType:
    """Return a module `windowsml` whose catalog has these entries while it is open."""

    class EpCatalog:
        def __init__(self) -> None:
            self._open = True

        def find_all_providers(self) -> list[ExecutionProvider]:
            if not self._open:
                raise RuntimeError("EpCatalog has been closed")
            return list(entries)

        def __enter__(self) -> EpCatalog:
            return self

        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            self._open = False

    module = ModuleType("windowsml")
    vars(module).update(
        EpCatalog=EpCatalog, EpReadyState=EpReadyState, EpCertification=EpCertification
    )
    return module


class OrtHardwareDeviceType(IntEnum):
    CPU = 0
    GPU = 1
    NPU = 2


@dataclass
class OrtHardwareDevice:
    type: OrtHardwareDeviceType
    vendor: str
    vendor_id: int = 0x10DE
    device_id: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass
class OrtEpDevice:
    ep_name: str
    device: OrtHardwareDevice
    ep_vendor: str = "Microsoft"
    ep_metadata: dict[str, str] = field(default_factory=dict)
    ep_options: dict[str, str] = field(default_factory=dict)


def ep_device(
    ep: str, kind: str = "GPU", vendor: str = "NVIDIA", device_id: int = 0
) -> OrtEpDevice:
    hardware = OrtHardwareDevice(OrtHardwareDeviceType[kind], vendor, device_id=device_id)
    return OrtEpDevice(f"{ep}ExecutionProvider", hardware, ep_metadata={"version": "1.0"})


class FakeRuntime:
    """onnxruntime: a registered library adds the devices in `brings`, by the provider's name."""

    def __init__(self, devices: list[OrtEpDevice], brings: dict[str, list[OrtEpDevice]]) -> None:
        self._devices, self._brings = devices, brings
        self.registered: list[tuple[str, str]] = []

    def get_ep_devices(self) -> list[OrtEpDevice]:
        return list(self._devices)

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if name not in self._brings:
            raise RuntimeError(f"LoadLibrary failed with error 126 for {path}\nat onnxruntime.cc:1")
        self.registered.append((name, path))
        self._devices += self._brings[name]
