"""Huge pages: what is merged, how much memory that takes, and that nothing else is touched."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime import memory
from llama_onnx.runtime.memory import Range, merge_pages, own_ranges, without

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE = pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(),
    reason="this system has no huge pages",
)
MB = 1 << 20

addresses = st.integers(0, 60)
ranges = st.lists(addresses, max_size=8, unique=True).map(
    lambda ends: list(zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False))
)


@given(st.tuples(addresses, addresses), ranges)
def test_what_is_left_of_a_range(whole: Range, known: Sequence[Range]) -> None:
    expected = set(range(*whole)) - {at for each in known for at in range(*each)}
    left = without(whole, known)
    assert [at for each in left for at in range(*each)] == sorted(expected)


def huge_bytes(start: int) -> int:
    """Return the bytes on huge pages of the memory that has the address `start`."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, high = (int(address, 16) for address in first.split("-"))
            found = low <= start < high
        elif found and first == "AnonHugePages:":
            return int(rest[0]) * 1024
    raise AssertionError("no such memory")


def address_of(memory_: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory_))


@HUGE
def test_new_memory_that_is_full_is_merged_and_keeps_its_values() -> None:
    before = own_ranges()
    new = mmap.mmap(-1, 32 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    new.write(bytes(range(256)) * (32 * MB // 256))
    thread = merge_pages(before)
    assert thread is not None
    thread.join(30)
    assert huge_bytes(address_of(new)) >= 24 * MB
    assert new[:] == bytes(range(256)) * (32 * MB // 256)


@HUGE
def test_memory_that_was_there_and_memory_that_is_empty_stay_as_they_are() -> None:
    old = mmap.mmap(-1, 32 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    old.write(b"1" * 32 * MB)
    before = own_ranges()
    empty = mmap.mmap(-1, 32 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    empty[:4096] = b"1" * 4096
    resident = memory.resident_bytes()
    if thread := merge_pages(before):
        thread.join(30)
    after = memory.resident_bytes()
    assert resident is not None and after is not None
    assert after[0] < resident[0] + 16 * MB
    assert huge_bytes(address_of(old)) < 24 * MB


@pytest.mark.skipif(sys.platform == "linux", reason="Linux has them")
def test_elsewhere_nothing_is_merged() -> None:
    assert own_ranges() == [] and merge_pages([]) is None
