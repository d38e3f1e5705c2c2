"""This process's memory: how much it uses, and ways to return what it does not need."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from llama_onnx.targets.errors import LlamaOnnxError, ResourceError

_MADV_PAGEOUT = 21  # linux/mman.h: as if memory were short; nothing that was written is lost
_INTERVAL = 0.2  # seconds
_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate",
    "could not allocate",
    "out of memory",
    "outofmemory",
    "not enough memory",
    "cannot allocate memory",
    "8007000e",
)
"""How ONNX Runtime, CUDA, DirectML and the C++ library say that memory ran out, in lower case."""


def forget_pages(file: Path) -> None:
    """Drop the pages of the mapped `file` from this process's resident memory.

    Pages needed later are read again. ONNX Runtime maps a package's weights and packs copies of
    most of them, one after the other; the originals stay resident until the last is packed,
    some of them longer. Does nothing except on Linux.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    name = str(file.resolve())
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        addresses, *_, mapped = line.split(maxsplit=5)
        if mapped == name:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


@contextmanager
def forgetting_pages(file: Path) -> Iterator[None]:
    """Call `forget_pages` five times a second while the block runs, and once more at its end."""
    ended = Event()

    def forget() -> None:
        while not ended.wait(_INTERVAL):
            forget_pages(file)

    thread = Thread(target=forget)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        forget_pages(file)


@contextmanager
def bounded_memory(most: int, what: str) -> Iterator[None]:
    """Let this process allocate at most `most` more bytes while the block runs.

    Raises `ResourceError` about `what` if the block fails for lack of memory. The limit holds on
    Linux only, where RLIMIT_DATA counts what a process may write to, and not the files it maps.
    """
    try:
        with _limit(most):
            yield
    except (RuntimeError, MemoryError, LlamaOnnxError) as error:
        if isinstance(error, ResourceError) or not is_memory_failure(error):
            raise
        raise ResourceError(
            f"{what} ran out of memory: {most / 1e9:.1f} GB are allowed, more than a sound package "
            "of this size needs; if this machine has as much, do not use the package."
        ) from None


@contextmanager
def _limit(most: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    status = Path("/proc/self/status").read_text("ascii", "replace")
    line = next(line for line in status.splitlines() if line.startswith("VmData:"))
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [int(line.split()[1]) * 1024 + most, *(n for n in (before, hard) if n >= 0)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def trim_heap() -> None:
    """Have glibc return freed memory to the system.

    A cache that is copied to a larger one at every step leaves half a gigabyte of holes. Does
    nothing where glibc is not the C library.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def resident_bytes() -> tuple[int, int] | None:
    """Return the bytes this process uses now and the most it ever used, mapped files included.

    None where the system does not report them.
    """
    if sys.platform == "win32":
        return _memory_counters()
    else:  # noqa: RET505  mypy calls what follows a return unreachable on Windows
        found = _proc_status("VmRSS", "VmHWM")
        return (found[0], found[1]) if found else None


def own_bytes() -> int | None:
    """Return the bytes that are this process's alone: no mapped files, which the system may drop
    and read again, and which other processes share. None where Linux does not report them."""
    found = _proc_status("RssAnon")
    return found[0] if found else None


def _proc_status(*names: str) -> tuple[int, ...] | None:
    """Return sizes that Linux reports of this process in bytes; None if it lacks one of them."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    if not fields.keys() >= set(names):
        return None
    return tuple(int(fields[name].split()[0]) * 1024 for name in names)


class _Counters(ctypes.Structure):
    """Windows' PROCESS_MEMORY_COUNTERS."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        ("peak", ctypes.c_size_t),
        ("now", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 6),
    )


if sys.platform == "win32":

    def _memory_counters() -> tuple[int, int] | None:
        kernel = ctypes.WinDLL("kernel32.dll")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        counters = _Counters(size=ctypes.sizeof(_Counters))
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        if not kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size):
            return None
        return int(counters.now), int(counters.peak)


def is_memory_failure(error: Exception) -> bool:
    """Return whether a library's error means that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _MEMORY)
