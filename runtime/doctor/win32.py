"""Read facts from Windows' DLLs and registry. Only Windows can import this module."""

from __future__ import annotations

import ctypes
import os
import sys
import winreg
from ctypes import wintypes
from pathlib import Path

from llama_onnx.runtime.doctor.facts import WindowsFacts

assert sys.platform == "win32"  # on other systems mypy skips the rest

_VC_RUNTIME = ("vcruntime140.dll", "vcruntime140_1.dll", "msvcp140.dll")
_X86 = {"AVX2": 40, "AVX512": 41}
_ARM = {"dot product": 43}
_DISPLAYS = r"SYSTEM\CurrentControlSet\Control\Class\{4d36e968-e325-11ce-bfc1-08002be10318}"
_PROCESSOR = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
_FILE_SYSTEM = r"SYSTEM\CurrentControlSet\Control\FileSystem"
_LONGEST_PATH = 32768


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX"""

    _fields_ = (
        ("length", wintypes.DWORD),
        ("load", wintypes.DWORD),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def gather() -> WindowsFacts:
    """Return the facts that exist only on Windows."""
    system = _system_folder()
    strays = [system, *(Path(folder) for folder in os.environ["PATH"].split(";") if folder)]
    libraries = {str(path / "onnxruntime.dll") for path in strays}
    long_paths = _registry(_FILE_SYSTEM, "LongPathsEnabled")
    return WindowsFacts(
        vc_runtime={name: _loaded_version(name) for name in _VC_RUNTIME},
        libraries={p: _file_version(Path(p)) for p in sorted(libraries) if Path(p).is_file()},
        system_folder=str(system),
        long_paths=None if long_paths is None else bool(long_paths),
    )


def processor_name() -> str | None:
    """Return the processor's name."""
    name = _registry(_PROCESSOR, "ProcessorNameString")
    return str(name).strip() if name else None


def features(machine: str) -> dict[str, bool | None]:
    """Return the instruction sets that int4 kernels need. Windows does not report VNNI."""
    known = _ARM if machine.lower() == "arm64" else _X86
    present = ctypes.windll.kernel32.IsProcessorFeaturePresent
    found: dict[str, bool | None] = {name: bool(present(n)) for name, n in known.items()}
    return found if known is _ARM else {**found, "VNNI": None, "AVX-VNNI": None}


def physical_cores() -> int | None:
    """Return the number of cores, not of threads."""
    ask = ctypes.windll.kernel32.GetLogicalProcessorInformationEx
    size = wintypes.DWORD(0)
    relation_processor_core = 0
    ask(relation_processor_core, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    if not ask(relation_processor_core, buffer, ctypes.byref(size)):
        return None
    cores = offset = 0
    while offset < size.value:  # records: relation (4 bytes), size of the record (4), more
        offset += max(8, int.from_bytes(buffer.raw[offset + 4 : offset + 8], "little"))
        cores += 1
    return cores or None


def memory() -> tuple[int, int] | None:
    """Return total and available bytes."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.total), int(status.available)


def adapters() -> tuple[str, ...]:
    """Return display adapters with the versions of their drivers."""
    found = []
    for index in range(16):
        key = rf"{_DISPLAYS}\{index:04}"
        if name := _registry(key, "DriverDesc"):
            version = _registry(key, "DriverVersion")
            found.append(f"{name} (driver {version})" if version else str(name))
    return tuple(dict.fromkeys(found))


def _system_folder() -> Path:
    buffer = ctypes.create_unicode_buffer(_LONGEST_PATH)
    ctypes.windll.kernel32.GetSystemDirectoryW(buffer, _LONGEST_PATH)
    return Path(buffer.value)


def _loaded_version(name: str) -> str | None:
    """Return the version of the DLL that the loader finds by this name; None if it finds none."""
    try:
        handle = ctypes.WinDLL(name)._handle
    except OSError:
        return None
    buffer = ctypes.create_unicode_buffer(_LONGEST_PATH)
    module = ctypes.c_void_p(handle)
    ctypes.windll.kernel32.GetModuleFileNameW(module, buffer, _LONGEST_PATH)
    return _file_version(Path(buffer.value)) or "of unknown version"


def _file_version(path: Path) -> str | None:
    """Return the version in a DLL's resources; None where it has none."""
    library = ctypes.WinDLL("version.dll")
    size = library.GetFileVersionInfoSizeW(str(path), None)
    data = ctypes.create_string_buffer(size)
    if not size or not library.GetFileVersionInfoW(str(path), 0, size, data):
        return None
    info, length = ctypes.c_void_p(), wintypes.UINT()
    root = "\\"
    if not library.VerQueryValueW(data, root, ctypes.byref(info), ctypes.byref(length)):
        return None
    if not info.value or length.value < 16:
        return None
    # VS_FIXEDFILEINFO: signature, structure version, then the file's version, high words first.
    words = (ctypes.c_uint16 * 8).from_address(info.value)
    return f"{words[5]}.{words[4]}.{words[7]}.{words[6]}"


def _registry(key: str, name: str) -> object:
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as opened:
            return winreg.QueryValueEx(opened, name)[0]
    except OSError:
        return None
