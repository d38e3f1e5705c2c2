"""Facts about a machine: plain data that `gather` collects and the judges read.

None means that a fact is not known on this system, unless stated otherwise. Sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Python:
    """The interpreter: `version` "3.11.2", `bits` 32 or 64, `machine` "x86_64", "arm64", ..."""

    version: str
    bits: int
    machine: str


@dataclass(frozen=True)
class Wheels:
    """What is installed, according to its metadata: distribution -> version.

    `llama_onnx` is the version of this project. `requires` are the requirements of each
    distribution of genai ("onnxruntime>=1.31.0"), `extras` those of this project by extra.
    `others` are the installed distributions that those extras name.
    """

    llama_onnx: str | None
    onnxruntime: Mapping[str, str]
    genai: Mapping[str, str]
    requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """The result of importing a module in a separate process; `error` is None if it loads.

    `providers` are those that onnxruntime reports, by its names.
    """

    version: str | None
    error: str | None = None
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Libraries:
    """The libraries of a provider that do not load, and whether cuDNN does."""

    provider: str
    missing: tuple[str, ...] = ()
    cudnn: bool | None = None
    error: str | None = None


@dataclass(frozen=True)
class ProviderRun:
    """The result of opening and running a small int4 Llama on a provider, in a separate process.

    `nodes` is the number of nodes in the graph, `elsewhere` that of nodes on other providers,
    `logits` are those of the last position. `error` is None if it ran.
    """

    provider: str
    nodes: int = 0
    elsewhere: int = 0
    logits: tuple[float, ...] = ()
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A device that NVIDIA's driver reports; `capability` is (8, 9) for an Ada, for example."""

    name: str
    driver: str
    memory: int
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class Graphics:
    """Graphics hardware: `adapters` from the bus or the registry, `gpus` from NVIDIA's driver.

    `driver` is the version of NVIDIA's kernel driver, `error` the reason why nvidia-smi fails.
    """

    adapters: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Int4Kernels:
    """The kernels that MatMulNBits uses on the CPU.

    `name` is the instruction set they are written for, None where there are no fast ones or nothing
    is known; `maybe` are better ones that need instructions which the system does not report.
    """

    name: str | None = None
    maybe: tuple[str, ...] = ()


@dataclass(frozen=True)
class Processor:
    """The CPU.

    `allowed` are the logical processors this process may use, `quota` how many of them its
    container may keep busy. `features` maps instruction sets to whether the processor has
    them, `int4` is derived from them.
    """

    name: str | None
    physical_cores: int | None
    logical: int
    allowed: int
    quota: float | None = None
    features: Mapping[str, bool | None] = field(default_factory=dict)
    int4: Int4Kernels = Int4Kernels()

    @property
    def usable(self) -> float:
        """The processors that this process may keep busy, 0.5 for half of one."""
        return float(self.allowed if self.quota is None else min(self.allowed, self.quota))


@dataclass(frozen=True)
class Memory:
    """Memory of the machine, and the `limit` of the container; `available` respects both."""

    total: int
    available: int
    limit: int | None = None


@dataclass(frozen=True)
class Disk:
    """A folder (`purpose`: "here" or "temp") and the space on its disk."""

    purpose: str
    path: str
    free: int
    total: int
    writable: bool


@dataclass(frozen=True)
class Encodings:
    """The encodings of output, of files opened without naming one, and of file names."""

    stdout: str
    files: str
    names: str


@dataclass(frozen=True)
class WindowsFacts:
    """Facts that exist only on Windows.

    `vc_runtime`: DLL -> file version, None where it does not load. `libraries`: each
    onnxruntime.dll in System32 and on PATH -> file version. `long_paths`: the registry's setting.
    """

    vc_runtime: Mapping[str, str | None]
    libraries: Mapping[str, str | None]
    system_folder: str
    long_paths: bool | None


@dataclass(frozen=True)
class WindowsML:
    """What Windows ML's catalog has for this machine: the providers in it, the devices that they
    drive once they are registered, and the reasons why some are not, by provider.

    `installed`: the package `windowsml` is there; without it nothing else is known.
    """

    installed: bool
    providers: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Facts:
    """Everything `doctor` judges. `platform` is a value of `sys.platform`."""

    platform: str
    python: Python
    wheels: Wheels
    onnxruntime: Loaded
    genai: Loaded
    libraries: tuple[Libraries, ...]
    tried: tuple[ProviderRun, ...]
    graphics: Graphics
    processor: Processor
    memory: Memory | None
    disks: tuple[Disk, ...]
    telemetry: str | None
    encodings: Encodings
    windows: WindowsFacts | None = None
    windows_ml: WindowsML | None = None
