"""Where the caches of several rows are: here, in memory that numpy can reach.

device_memory.py has the same for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.engine.cache_layout import Block, CacheLayout

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class DeviceView:
    """A contiguous part of the memory of a device, which `owner` keeps alive."""

    pointer: int
    shape: tuple[int, ...]
    kind: type[np.generic]
    device: str
    owner: Any

    def bind(self, bind: Callable[..., None], name: str) -> None:
        """Bind the input or output `name` to it by a method of an `onnxruntime.IOBinding`."""
        bind(name, self.device, 0, self.kind, self.shape, self.pointer)


class Buffers(Protocol):
    """The keys and values of some rows, each [rows, kv_heads, positions, head_size]."""

    def views(self, first: int, end: int) -> Mapping[str, Array | DeviceView]:
        """Return the rows from `first` to `end`, to which a run of the graph can be bound."""

    def take(self, row: int, start: int, end: int) -> Block:
        """Return a copy of some positions of a row."""

    def put(self, row: int, start: int, block: Block) -> None:
        """Write `block` to a row, from position `start` on."""

    def swap(self, row: int, other: int, filled: int) -> None:
        """Exchange the first `filled` positions of two rows."""

    def resize(self, rows: int, length: int, moves: Sequence[Move]) -> None:
        """Become `rows` rows of `length` positions, zeros but for what `moves` says."""


Move = tuple[int, int, int]
"""A row, the row that it was, and how many of its positions are filled."""


class HostBuffers:
    """Arrays of numpy."""

    def __init__(self, layout: CacheLayout) -> None:
        self._layout = layout
        self._arrays = layout.buffers(0, 0)

    def views(self, first: int, end: int) -> dict[str, Array]:
        """Return views of the rows from `first` to `end`."""
        return {name: array[first:end] for name, array in self._arrays.items()}

    def take(self, row: int, start: int, end: int) -> Block:
        """Return a copy of some positions of a row."""
        return {name: array[row, :, start:end].copy() for name, array in self._arrays.items()}

    def put(self, row: int, start: int, block: Block) -> None:
        """Write `block` to a row, from position `start` on."""
        for name, array in self._arrays.items():
            array[row, :, start : start + block[name].shape[1]] = block[name]

    def swap(self, row: int, other: int, filled: int) -> None:
        """Exchange the first `filled` positions of two rows."""
        for array in self._arrays.values():
            moved = array[other, :, :filled].copy()
            array[other, :, :filled] = array[row, :, :filled]
            array[row, :, :filled] = moved

    def resize(self, rows: int, length: int, moves: Sequence[Move]) -> None:
        """Become `rows` rows of `length` positions, one part after the other: each frees memory."""
        for name, old in self._arrays.items():
            new = self._layout.zeros(name, rows, length)
            for row, other, filled in moves:
                if filled:
                    new[row, :, :filled] = old[other, :, :filled]
            self._arrays[name] = new
