"""Which processor this is, as far as its speed depends on it."""

from __future__ import annotations

import platform
from pathlib import Path

SETS = {
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX512 without VNNI",
    "avx2": "AVX2, no VNNI",
}
"""Linux's flag -> instruction set, the fastest first."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return name, family and model, and instruction set."""
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text("utf-8", errors="replace").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    flags = facts.get("flags", "").split()
    best = next((name for flag, name in SETS.items() if flag in flags), "no AVX2")
    family = f"family {facts.get('cpu family')}, model {facts.get('model')}"
    return f"{facts.get('model name', platform.machine())} ({family}), {best}"
