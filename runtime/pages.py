"""Gives back memory that only looks used: the pages of a mapped file."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_MADV_PAGEOUT = 21  # linux/mman.h: as if memory were short; nothing that was written is lost


def forget_pages(file: Path) -> None:
    """Drop the pages of `file` from this process's resident memory; what is needed is read again.

    ONNX Runtime maps a package's weights and packs copies of most; the originals stay resident,
    0.8 GB of them for int4 of 7B. On Linux alone; elsewhere nothing happens.
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
