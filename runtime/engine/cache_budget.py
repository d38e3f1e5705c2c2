"""How much the caches may hold on this machine."""

from __future__ import annotations

import ctypes
import logging
import sys

from llama_onnx.runtime.doctor.gather import gather_memory
from llama_onnx.runtime.engine.cache_layout import CacheLayout
from llama_onnx.runtime.engine.schedule import Capacity
from llama_onnx.targets.errors import ResourceError
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU, CUDA

ROWS = 8
"""Most sequences at once: steps of more rows are hardly faster for each."""

_SHARE = 0.5
"""Of the memory that is free once the package is open. Reading a prompt needs some of the rest."""

_UNKNOWN = 2 << 30
"""Bytes where the system does not say what is free."""

log = logging.getLogger("llama_onnx.engine")


def shared_bytes(processes: int, package_bytes: int) -> int:
    """Return what the caches of `processes` may take together, each of which will open a package of
    this size first: of what is left then, as much as those of one process."""
    memory = gather_memory()
    if memory is None:
        return _UNKNOWN
    return int(max(0, memory.available - processes * package_bytes) * _SHARE)


def decide_capacity(
    layout: CacheLayout,
    context_length: int,
    *,
    cache_bytes: int | None = None,
    rows: int = ROWS,
    rectangular: bool = True,
    beside: int = 0,
    provider: Provider = CPU,
) -> Capacity:
    """Return what caches of `cache_bytes` hold, by default of half of the memory that is free where
    `provider` keeps them.

    `beside` is the bytes that each position takes in a draft's cache. Raises `ResourceError` if
    they hold no token.
    """
    where = "as set"
    if cache_bytes is None:
        free = _free_bytes(provider)
        cache_bytes = _UNKNOWN if free is None else int(free * _SHARE)
        where = "nothing known" if free is None else f"half of the {free / 1e9:.1f} GB free"
    position_bytes = layout.position_bytes + beside
    positions = cache_bytes // position_bytes
    if not positions:
        raise ResourceError(
            f"the caches may take {cache_bytes:,} bytes ({where}), and one token takes "
            f"{position_bytes:,}: give them more with --cache-memory."
        )
    log.info(
        "caches: %.2f GB (%s) hold %s tokens at %s bytes each, %.1f contexts of %s; at most %d "
        "sequences at once",
        cache_bytes / 1e9,
        where,
        f"{positions:,}",
        f"{position_bytes:,}",
        positions / context_length,
        f"{context_length:,}",
        rows,
    )
    return Capacity(rows, positions, rectangular)


def _free_bytes(provider: Provider) -> int | None:
    """Return the bytes that are free in the provider's memory; None: unknown."""
    if provider == CUDA:
        return _free_on_cuda()
    memory = gather_memory()
    return None if memory is None else memory.available


def _free_on_cuda() -> int | None:
    """Ask CUDA's runtime library, which an open session has loaded, for its first device.

    https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
    """
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for library in CUDA.libraries.get(sys.platform, ()):
        if "cudart" in library.name:
            try:
                runtime = ctypes.CDLL(library.name)
                failed = runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
            except (OSError, AttributeError):
                return None
            return None if failed else free.value
    return None
