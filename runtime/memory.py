"""Gives back memory that only looks used: pages of a mapped file, and what was freed."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

_MADV_PAGEOUT = 21  # linux/mman.h: as if memory were short; nothing that was written is lost


_INTERVAL = 0.2  # seconds


def forget_pages(file: Path) -> None:
    """Drop the pages of `file` from this process's resident memory; what is needed is read again.

    ONNX Runtime maps a package's weights and packs copies of most, one after the other; the
    originals stay resident until the last is packed, and some longer. On Linux alone; elsewhere
    nothing happens.
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
    """`forget_pages` of `file` again and again while the block runs, and once more at its end."""
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


def give_back_what_is_freed() -> None:
    """Have glibc return to the system what was freed and lies in holes.

    Caches that grow by a token at every step leave half a gigabyte of them. Elsewhere nothing
    happens.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
