"""How much the caches may hold on this machine."""

from __future__ import annotations

import logging

from llama_onnx.runtime.doctor.gather import gather_memory
from llama_onnx.runtime.engine.cache_layout import CacheLayout
from llama_onnx.runtime.engine.schedule import Capacity

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
) -> Capacity:
    """Return what caches of `cache_bytes` hold, by default of half of the memory that is free.

    `beside` is the bytes that each position takes in a draft's cache.
    """
    where = "as asked"
    if cache_bytes is None:
        memory = gather_memory()
        cache_bytes = int(memory.available * _SHARE) if memory else _UNKNOWN
        where = f"half of the {memory.available / 1e9:.1f} GB free" if memory else "nothing known"
    position_bytes = layout.position_bytes + beside
    positions = cache_bytes // position_bytes
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
