"""This process's memory: how much it uses, and ways to return what it does not need."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread, get_native_id
from typing import TypeAlias

from llama_onnx.targets.errors import LlamaOnnxError, ResourceError

_MADV_PAGEOUT = 21  # linux/mman.h: as if memory were short; nothing that was written is lost
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_HUGE = 1 << 21  # bytes of a huge page on x86-64, and on Arm with pages of 4 kB
_SLICE = 16 * _HUGE
_NICE = 10
_FILLED = 0.95  # of a range, so that huge pages take no memory that the range does not use already
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


Range: TypeAlias = tuple[int, int]
"""The addresses of memory, from the first up to the one after the last."""


def own_ranges() -> list[Range]:
    """Return the memory of this process that is no file's, in order; nothing except on Linux."""
    return [(start, end) for start, end, _ in _anonymous("/proc/self/maps")]


def merge_pages(before: Sequence[Range]) -> Thread | None:
    """Put what this process has allocated since it had the ranges `before` on huge pages, in a
    thread that ends with the process.

    Weights are read from start to end for each token, and pages of 4 kB cost up to a fifth of that
    time. Where Linux does not use huge pages by itself ("madvise", Ubuntu's default), the
    allocator of ONNX Runtime does not ask for them. Only memory that is full is merged: nothing
    takes more of it. Returns None except on Linux, and does nothing before Linux 6.1.
    https://docs.kernel.org/admin-guide/mm/transhuge.html
    """
    found = [
        (start, end)
        for start, end, filled in _anonymous("/proc/self/smaps")
        if filled >= _FILLED * (end - start)
    ]
    parts = [part for each in found for part in _huge_parts(without(each, before))]
    if not parts:
        return None
    thread = Thread(target=_merge, args=(parts,), name="llama-onnx huge pages", daemon=True)
    thread.start()
    return thread


def without(whole: Range, known: Sequence[Range]) -> list[Range]:
    """Return what of `whole` is in none of the ranges `known`, which are in order and apart.

    >>> without((0, 10), [(2, 3), (8, 20)])
    [(0, 2), (3, 8)]
    """
    start, end = whole
    found = []
    for first, last in known:
        if first < end and last > start:
            found.append((start, first))
            start = max(start, last)
    found.append((start, end))
    return [(first, last) for first, last in found if first < last]


def _huge_parts(ranges: Sequence[Range]) -> Iterator[Range]:
    """Yield the parts of ranges that whole huge pages can take, a few pages at a time."""
    for start, end in ranges:
        first, last = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
        yield from ((at, min(at + _SLICE, last)) for at in range(first, last, _SLICE))


def _merge(parts: Sequence[Range]) -> None:
    if sys.platform == "linux":  # where each thread has a priority: answers come first
        os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)
    libc = ctypes.CDLL(None, use_errno=True)
    for start, end in parts:
        place = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
        libc.madvise(*place, _MADV_HUGEPAGE)
        # A range that was freed meanwhile, or too little memory, is no reason to stop.
        if libc.madvise(*place, _MADV_COLLAPSE) and ctypes.get_errno() == errno.EINVAL:
            return


def _anonymous(file: str) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and resident bytes of what this process may write to and is no file's, from
    /proc/self/maps, which has no resident bytes, or smaps."""
    if sys.platform != "linux":
        return
    place: Range | None = None
    for line in Path(file).read_text(errors="surrogateescape").splitlines():
        first, *rest = line.split(maxsplit=5)
        if first.endswith(":"):
            if first == "Rss:" and place is not None:
                yield *place, int(rest[0]) * 1024
            continue
        plain = rest[0] == "rw-p" and rest[3] == "0" and rest[4:] in ([], ["[heap]"])
        start, end = (int(address, 16) for address in first.split("-"))
        place = (start, end) if plain else None
        if plain and not file.endswith("smaps"):
            yield start, end, 0


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
