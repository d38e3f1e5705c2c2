"""A slot's bytes, a few rows at a time: read, checked, encoded, in the order of the data file.

Rows are processed in parallel and come out in order. Only a few chunks are in memory at a time,
even for a large matrix.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.calibration.store import Calibrated
from llama_onnx.exporter.formats.tensor import LazyTensor, damaged_rows
from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.model.checkpoint import Checkpoint, CodedMatrix, HoldsCodes
from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.exporter.model.storage import Quantize, RowBlocks, Storage
from llama_onnx.targets.errors import CheckpointError

CHUNK_VALUES = 1 << 19
"""Values worked on at once by one thread: 2 MiB of float32, so that temporaries stay in cache."""

Array = npt.NDArray[Any]
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Source:
    """A tensor that fills rows of a slot.

    `encode(start, stop)` gives its rows `[start, stop)` as the arrays of the slot's storage; it may
    be called from several threads and raises `CheckpointError` for a value that is not finite.
    `order` [K] int64 is the input channel of each column, if the codes have another order than the
    channels.
    """

    shape: tuple[int, ...]
    encode: Callable[[int, int], tuple[Array, ...]]
    order: npt.NDArray[np.int64] | None = None


def slot_arrays(
    slot: Slot,
    checkpoint: Checkpoint,
    quantize: Quantize,
    pool: ThreadPoolExecutor,
    workers: int,
    calibrated: Calibrated | None = None,
) -> Iterator[Iterator[Array]]:
    """Yield, for each initializer of `slot` in turn, the arrays that make up its bytes.

    `calibrated` has codes that a calibration chose, which are taken instead of those of `quantize`.
    Each inner iterator must be exhausted before the next one is requested. Raises
    `CheckpointError` for a value that is not finite.
    """
    if slot.table is not None:
        return map(iter, [[array] for array in slot.storage.encode(slot.table, quantize)])
    sources = slot_sources(slot, checkpoint, quantize, calibrated)
    return source_arrays(sources, slot.storage, pool, workers)


def slot_sources(
    slot: Slot,
    checkpoint: Checkpoint,
    quantize: Quantize,
    calibrated: Calibrated | None = None,
) -> list[Source]:
    """Return the sources of the rows of `slot`, in order."""
    storage = slot.storage
    if slot.keeps_codes:
        assert isinstance(checkpoint, HoldsCodes), "the recipe was made for this checkpoint"
        return [_kept(checkpoint.coded(name), storage) for name in slot.sources]
    if calibrated is not None and calibrated.has(slot.sources):
        return [_chosen(checkpoint.tensor(name), storage, calibrated) for name in slot.sources]
    return [_encoded(checkpoint.tensor(name), storage, quantize) for name in slot.sources]


def source_arrays(
    sources: Sequence[Source], storage: Storage, pool: ThreadPoolExecutor, workers: int
) -> Iterator[Iterator[Array]]:
    """Yield as `slot_arrays` does, for `sources` joined along rows and stored as `storage`."""
    chunks = ordered_map(lambda chunk: chunk(), _chunks(sources), pool, 2 * workers)
    shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
    yield from storage.join(chunks, shape)
    if sources[0].order is not None:
        yield iter([sources[0].order])


def ordered_map(
    function: Callable[[_T], _R], items: Iterable[_T], pool: ThreadPoolExecutor, depth: int
) -> Iterator[_R]:
    """Yield as `pool.map` does, with at most `depth` results ahead of the consumer."""
    pending: deque[Future[_R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _chunks(sources: Sequence[Source]) -> Iterator[Callable[[], tuple[Array, ...]]]:
    for source in sources:
        width = source.shape[1] if len(source.shape) > 1 else 1
        step = max(1, CHUNK_VALUES // width)
        for start in range(0, source.shape[0], step):
            yield partial(source.encode, start, min(start + step, source.shape[0]))


def _encoded(tensor: LazyTensor, storage: Storage, quantize: Quantize) -> Source:
    """Return a source that reads a tensor as floats and encodes it."""

    def encode(start: int, stop: int) -> tuple[Array, ...]:
        rows = tensor.rows(start, stop)
        arrays = storage.encode(rows, quantize)
        if (dtype := _overflown(arrays)) is not None:
            _refuse(tensor.name, start, stop, overflow=np.isfinite(rows).all(), dtype=dtype)
        return arrays

    return Source(tensor.shape, encode)


def _chosen(tensor: LazyTensor, storage: Storage, calibrated: Calibrated) -> Source:
    """Return a source of the codes that a calibration chose for `tensor`."""

    def encode(start: int, stop: int) -> tuple[Array, ...]:
        rows = np.broadcast_to(np.float32(0), (stop - start, tensor.shape[1]))  # not looked at
        return storage.encode(rows, lambda _, to: calibrated.rows(tensor.name, start, stop, to))

    return Source(tensor.shape, encode)


def _kept(matrix: CodedMatrix, storage: Storage) -> Source:
    """Return a source that keeps a matrix's codes and changes only the form of its scales."""
    assert isinstance(storage, RowBlocks), "the recipe keeps no other codes"

    def encode(start: int, stop: int) -> tuple[Array, ...]:
        codes, scales, *zeros = matrix.blocks(start, stop)
        stored = storage.stored(scales)
        if (dtype := _overflown(stored)) is not None:
            _refuse(matrix.name, start, stop, overflow=False, dtype=dtype)
        return codes, *stored, *zeros

    return Source(matrix.shape, encode, matrix.order)


def _overflown(arrays: Sequence[Array]) -> np.dtype[Any] | None:
    """Return the type of the first of `arrays` that holds a NaN or infinity; None if none does."""
    floats = (array for array in arrays if array.dtype in DTYPES.values())
    return next((array.dtype for array in floats if not np.isfinite(array).all()), None)


def _refuse(
    name: str, start: int, stop: int, *, overflow: bool | np.bool, dtype: np.dtype[Any]
) -> None:
    if overflow:
        raise CheckpointError(
            f"{name}, rows {start} to {stop - 1}: a value is too large for {dtype}: export with "
            "--precision fp32."
        )
    raise damaged_rows(name, start, stop)
