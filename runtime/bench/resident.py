"""The memory this process holds, files it has mapped included."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def resident_bytes() -> tuple[int, int] | None:
    """Now, and the most there ever was; None where the system does not tell."""
    if sys.platform == "win32":
        return _ask_windows()
    else:  # noqa: RET505  mypy calls what follows a return unreachable on Windows
        return _read_proc()


def _read_proc() -> tuple[int, int] | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if "VmRSS" not in fields or "VmHWM" not in fields:
        return None
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS"""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("now", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    )


if sys.platform == "win32":

    def _ask_windows() -> tuple[int, int] | None:
        kernel = ctypes.WinDLL("kernel32.dll")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        counters = _Counters(size=ctypes.sizeof(_Counters))
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        if not kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size):
            return None
        return int(counters.now), int(counters.peak)
