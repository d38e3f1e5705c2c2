"""A slot's bytes, a few rows at a time: read, checked, quantized, in the order of the data file.

Rows are worked on in parallel and come out in order. At no moment are more than a handful of chunks
in memory, whatever the matrix's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import LazyTensor
from llama_onnx.exporter.graph.slots import Slot
from llama_onnx.exporter.model.checkpoint import Checkpoint, CodedMatrix, HoldsCodes
from llama_onnx.exporter.model.dtypes import DTYPES
from llama_onnx.exporter.model.storage import Blocks, Float, Storage
from llama_onnx.exporter.quantize.rtn import pack, quantize_rows, round_to_codes
from llama_onnx.targets.errors import CheckpointError

CHUNK_VALUES = 1 << 19
"""Values worked on at once by one thread: 2 MiB of float32, so that temporaries stay in cache."""

Array = npt.NDArray[np.generic]
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class _Chunk:
    """Rows `[start, stop)` of one source tensor."""

    tensor: LazyTensor | CodedMatrix
    start: int
    stop: int


def slot_arrays(
    slot: Slot, checkpoint: Checkpoint, pool: ThreadPoolExecutor, workers: int
) -> Iterator[Iterator[Array]]:
    """Yield, for each initializer of `slot` in turn, the arrays that make up its bytes.

    Each inner iterator has to be exhausted before the next one is asked for. Raises
    `CheckpointError` for a value that is not finite.
    """
    if slot.table is not None:
        assert isinstance(slot.storage, Float)
        return iter([iter([slot.table.astype(DTYPES[slot.storage.name])])])
    return tensor_arrays(slot_tensors(slot, checkpoint), slot.storage, pool, workers)


def slot_tensors(slot: Slot, checkpoint: Checkpoint) -> list[LazyTensor | CodedMatrix]:
    """What the rows of `slot` are made of: the source's own codes, if it stores these."""
    if isinstance(slot.storage, Blocks) and slot.storage.zero_points:
        assert isinstance(checkpoint, HoldsCodes), "no quantizer makes zero points"
        return [checkpoint.coded(name) for name in slot.sources]
    return [checkpoint.tensor(name) for name in slot.sources]


def tensor_arrays(
    tensors: Sequence[LazyTensor | CodedMatrix],
    storage: Storage,
    pool: ThreadPoolExecutor,
    workers: int,
) -> Iterator[Iterator[Array]]:
    """`slot_arrays` for `tensors`, concatenated along rows and stored as `storage`."""
    chunks = _chunks(tensors)
    if isinstance(storage, Float):
        dtype = DTYPES[storage.name]
        yield ordered_map(lambda chunk: _convert(chunk, dtype), chunks, pool, 2 * workers)
        return
    if storage.columnwise:
        yield from _columnwise(tensors, storage, pool, workers)
        return
    behind: list[Sequence[Array]] = []  # scales and zero points: small, and behind the codes

    def codes() -> Iterator[Array]:
        work = ordered_map(lambda chunk: _quantize(chunk, storage), chunks, pool, 2 * workers)
        for packed, *others in work:
            behind.append(others)
            yield packed

    yield codes()
    yield from map(iter, zip(*behind, strict=True))
    if isinstance(tensors[0], CodedMatrix) and tensors[0].order is not None:
        yield iter([tensors[0].order])


def _columnwise(
    tensors: Sequence[LazyTensor | CodedMatrix],
    storage: Blocks,
    pool: ThreadPoolExecutor,
    workers: int,
) -> Iterator[Iterator[Array]]:
    """Codes [K, N] and scales [blocks, N]: every row of the file has something of every row of the
    source, so that the codes of one whole matrix are in memory, a byte each."""
    rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[1]
    codes = np.empty((columns, rows), np.uint8)
    scales = np.empty((storage.num_blocks(columns), rows), DTYPES[storage.scales])
    start = 0
    work = ordered_map(
        lambda chunk: _round_columns(chunk, storage), _chunks(tensors), pool, 2 * workers
    )
    for part, part_scales in work:
        stop = start + part.shape[1]
        codes[:, start:stop], scales[:, start:stop] = part, part_scales
        start = stop
    yield _packed_in_pieces(codes.reshape(-1), storage.bits)
    yield iter([scales])


def _packed_in_pieces(codes: npt.NDArray[np.uint8], bits: int) -> Iterator[Array]:
    """`codes` packed one behind the other; an odd one at the very end has a nibble of zeros."""
    for start in range(0, len(codes), CHUNK_VALUES):
        piece = codes[start : start + CHUNK_VALUES]
        yield pack(np.append(piece, np.uint8(0)) if len(piece) % 2 else piece, bits)


def ordered_map(
    function: Callable[[_T], _R], items: Iterable[_T], pool: ThreadPoolExecutor, depth: int
) -> Iterator[_R]:
    """`pool.map`, but never more than `depth` results ahead of the consumer."""
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


def _chunks(tensors: Sequence[LazyTensor | CodedMatrix]) -> Iterator[_Chunk]:
    for tensor in tensors:
        width = tensor.shape[1] if len(tensor.shape) > 1 else 1
        step = max(1, CHUNK_VALUES // width)
        for start in range(0, tensor.shape[0], step):
            yield _Chunk(tensor, start, min(start + step, tensor.shape[0]))


def _convert(chunk: _Chunk, dtype: np.dtype[Any]) -> Array:
    assert isinstance(chunk.tensor, LazyTensor)
    rows = chunk.tensor.rows(chunk.start, chunk.stop)
    with np.errstate(over="ignore"):
        converted = rows.astype(dtype, copy=False)
    if not np.isfinite(converted).all():
        _refuse(chunk, np.isfinite(rows).all(), dtype)
    return converted


def _quantize(chunk: _Chunk, storage: Blocks) -> tuple[Array, ...]:
    """Codes, scales and, if they have been taken over, zero points of the chunk."""
    if isinstance(chunk.tensor, CodedMatrix):
        codes, scales, *zeros = chunk.tensor.blocks(chunk.start, chunk.stop)
        with np.errstate(over="ignore"):
            scales = scales.astype(DTYPES[storage.scales], copy=False)
        _check_scales(chunk, scales, None)
        return codes, scales, *zeros
    rows = chunk.tensor.rows(chunk.start, chunk.stop)
    packed, found = quantize_rows(rows, storage)
    _check_scales(chunk, found, rows)
    return packed, found


def _round_columns(chunk: _Chunk, storage: Blocks) -> tuple[Array, Array]:
    """Signed codes [K, rows] in the bits of unsigned ones, and scales [blocks, rows]."""
    assert isinstance(chunk.tensor, LazyTensor)
    rows = chunk.tensor.rows(chunk.start, chunk.stop)
    codes, scales = round_to_codes(rows, storage)
    _check_scales(chunk, scales, rows)
    half, mask = 1 << (storage.bits - 1), (1 << storage.bits) - 1
    return ((codes[:, : rows.shape[1]] - half) & mask).T, scales.T


def _check_scales(chunk: _Chunk, scales: Array, rows: npt.NDArray[np.float32] | None) -> None:
    if not np.isfinite(scales).all():
        _refuse(chunk, rows is not None and np.isfinite(rows).all(), scales.dtype)


def _refuse(chunk: _Chunk, overflow: bool | np.bool, dtype: np.dtype[Any]) -> None:
    where = f"{chunk.tensor.name}, rows {chunk.start} to {chunk.stop - 1}"
    if overflow:
        raise CheckpointError(
            f"{where}: a value is too large for {dtype}: export with --precision fp32."
        )
    raise CheckpointError(
        f"{where}: the weights hold NaN or infinity: the checkpoint is damaged, or its training "
        "diverged."
    )
