"""Judge what exists only on Windows: the VC runtime, stray DLLs, the limit on path lengths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ntpath import dirname, normcase

from llama_onnx.runtime.doctor.facts import WindowsFacts
from llama_onnx.runtime.doctor.finding import Finding
from llama_onnx.runtime.doctor.requirements import numbers

MSVCP = "msvcp140.dll"
OLDEST_MSVCP = (14, 40)
"""Code built with Visual Studio 2022 17.10 or newer initializes a mutex at compile time; an older
msvcp140.dll fails with an access violation when it locks such a mutex (microsoft/onnxruntime issues
21543, 26599)."""

_INSTALL_VC = "run `winget install Microsoft.VCRedist.2015+.x64`"


def judge_windows(windows: WindowsFacts) -> Iterator[Finding]:
    """Yield all findings about Windows."""
    yield judge_vc_runtime(windows.vc_runtime)
    yield judge_strays(windows.libraries, windows.system_folder)
    yield judge_long_paths(windows.long_paths)


def judge_vc_runtime(versions: Mapping[str, str | None]) -> Finding:
    """Judge whether the C++ libraries that ONNX Runtime needs are installed and new enough."""
    name = "VC runtime"
    missing = [library for library, version in versions.items() if version is None]
    if missing:
        found = f"{', '.join(missing)} not found: onnxruntime cannot be loaded"
        return Finding(name, "trouble", found, _INSTALL_VC)
    found = ", ".join(f"{library} {version}" for library, version in versions.items())
    version = numbers(versions.get(MSVCP) or "")
    if version and version < OLDEST_MSVCP:
        oldest = ".".join(map(str, OLDEST_MSVCP))
        crash = f"{found}: {MSVCP} before {oldest} crashes onnxruntime"
        return Finding(name, "warning", crash, _INSTALL_VC)
    return Finding(name, "ok", found)


def judge_strays(libraries: Mapping[str, str | None], system_folder: str) -> Finding:
    """Judge which onnxruntime.dll a program would load if it does not ship its own.

    Windows has one in System32, which belongs there; one on PATH is a mistake. Python loads the
    wheel's by its full path, so this concerns only programs that embed the runtime.
    """
    name = "onnxruntime.dll"
    system = normcase(system_folder)
    on_path = [path for path in libraries if normcase(dirname(path)) != system]
    known = ", ".join(f"{path} ({version or 'no version'})" for path, version in libraries.items())
    if on_path:
        found = f"{known}: a program without its own may load one of these"
        folders = " and ".join(dirname(path) for path in on_path)
        mend = f"remove {folders} from PATH; `where.exe onnxruntime.dll` lists those on it"
        return Finding(name, "warning", found, mend)
    if libraries:
        return Finding(name, "ok", f"Windows' own, {known}: ship one beside your program")
    return Finding(name, "ok", "none on PATH or in System32")


def judge_long_paths(enabled: bool | None) -> Finding:
    """Judge whether paths may be longer than 260 characters."""
    if enabled is None:
        return Finding("long paths", "ok", "cannot be determined here")
    if enabled:
        return Finding("long paths", "ok", "allowed")
    key = r"HKLM\SYSTEM\CurrentControlSet\Control\FileSystem"
    command = f"reg add {key} /v LongPathsEnabled /t REG_DWORD /d 1 /f"
    found = "paths of more than 260 characters fail"
    return Finding("long paths", "warning", found, f"run `{command}` as administrator")
