"""Read facts from Linux's files below `root`, which tests replace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")

_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
_X86 = {
    "AVX2": ("avx2", "fma"),
    "AVX512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "VNNI": ("avx512_vnni",),
    "AVX-VNNI": ("avx_vnni",),
}
_ARM = {"dot product": ("asimddp",), "int8 matrix": ("i8mm",), "SVE": ("sve",)}
"""Instruction sets, by the names people use -> the kernel's flags for them."""


def read(path: Path) -> str:
    """Return the text of a file; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor_name(root: Path = ROOT) -> str | None:
    """Return the processor's name; kernels for ARM do not report it."""
    return next((cpu["model name"] for cpu in _processors(root) if "model name" in cpu), None)


def physical_cores(root: Path = ROOT) -> int | None:
    """Return the number of cores, not of threads; None where the kernel does not report it."""
    cores = {
        (cpu["physical id"], cpu["core id"])
        for cpu in _processors(root)
        if "physical id" in cpu and "core id" in cpu
    }
    return len(cores) or None


def features(root: Path = ROOT) -> dict[str, bool | None]:
    """Return the instruction sets that int4 kernels need, by the names people use."""
    for cpu in _processors(root):
        for key, known in (("flags", _X86), ("Features", _ARM)):
            if key in cpu:
                flags = set(cpu[key].split())
                return {name: flags.issuperset(needed) for name, needed in known.items()}
    return {}


def memory(root: Path = ROOT) -> tuple[int, int] | None:
    """Return total and available bytes of the machine."""
    fields = dict(
        line.split(":", 1) for line in read(root / "proc/meminfo").splitlines() if ":" in line
    )
    try:
        total, available = (
            int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable")
        )
    except (KeyError, ValueError, IndexError):
        return None
    return total, available


def container_memory(root: Path = ROOT) -> tuple[int, int] | None:
    """Return the tightest limit on this process's memory, and what is free below it, in bytes."""
    found = []
    for folder in _groups(root, "memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is not None and limit < 1 << 60:  # version 1 writes no limit as a huge one
            cached = _cached(read(folder / "memory.stat"))
            found.append((limit, max(0, limit - max(0, (used or 0) - cached))))
    if not found:
        return None
    return min(limit for limit, _ in found), min(free for _, free in found)


def container_cores(root: Path = ROOT) -> float | None:
    """Return how many processors this process's container may keep busy; None: all of them."""
    quotas = []
    for folder in _groups(root, "cpu"):
        files = [folder / "cpu.max", folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"]
        quota, period, *_ = [*(word for file in files for word in read(file).split()), "", ""]
        if quota.isdecimal() and period.isdecimal() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def nvidia_driver(root: Path = ROOT) -> str | None:
    """Return the version of NVIDIA's kernel module, such as "580.82.07"."""
    words = read(root / "proc/driver/nvidia/version").split()
    return next((word for word in words if word[0].isdecimal() and "." in word), None)


def adapters(root: Path = ROOT) -> tuple[str, ...]:
    """Return the vendors of the display adapters on the PCI bus."""
    return tuple(
        _VENDORS.get(vendor, f"PCI vendor {vendor}")
        for folder in sorted((root / "sys/bus/pci/devices").glob("*"))
        if read(folder / "class").startswith("0x03") and (vendor := read(folder / "vendor").strip())
    )


def _processors(root: Path) -> Iterator[dict[str, str]]:
    for block in read(root / "proc/cpuinfo").split("\n\n"):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        yield {key.strip(): value.strip() for key, value in pairs}


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and its parents, versions 1 and 2.

    In a container the group's path may be the host's, while the folder at the top is the
    container's; `read` returns "" for a file that does not exist.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / path.strip("/")
        yield group
        yield from (parent for parent in group.parents if parent == top or top in parent.parents)


def _cached(stat: str) -> int:
    """Return the bytes of cached files, which the kernel frees on demand."""
    fields = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _number(path: Path) -> int | None:
    text = read(path).strip()
    return int(text) if text.isdecimal() else None
