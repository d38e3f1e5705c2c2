"""Files written by `torch.save`: finds each tensor without reading its values or running code.

Such a file is a zip of uncompressed records: a pickle that describes the tensors, and the bytes of
each storage (https://docs.pytorch.org/docs/stable/notes/serialization.html). torch is not used:
nothing that the file says is allocated before it is checked against the file's size. Rows are read
from the file, not mapped: every page of a mapped shard that was read would stay resident.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.placeholder import refuse_placeholder_file
from llama_onnx.exporter.formats.tensor import (
    Float32,
    LazyTensor,
    check_name,
    describe_unreadable,
    widen,
)
from llama_onnx.exporter.formats.torch_pickle import (
    MAX_BYTES,
    Described,
    ForeignError,
    PickleError,
    read_pickle,
)
from llama_onnx.exporter.formats.zip_records import CompressedError, Record, ZipError, read_records
from llama_onnx.targets.errors import CheckpointError, UnsupportedError

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "float64": ("F64", np.dtype("<f8")),
    "float32": ("F32", np.dtype("<f4")),
    "float16": ("F16", np.dtype("<f2")),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE = "/data.pkl"


def read_torch_file(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of the state dict in `path` by name, without reading their values.

    Raises `CheckpointError` for a file that is damaged, holds something else or would run code;
    `UnsupportedError` for the format before PyTorch 1.6 and for tensors that cannot be read row by
    row.
    """
    try:
        with path.open("rb") as file:
            refuse_placeholder_file(path, file)
            records = _records(file, path)
            content = _content(file, records, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path} holds {type(content).__name__} instead of a dict of tensors: it is not a "
            "state dict."
        )
    # torch.save has keys of any kind; two that are the same text would be one tensor.
    names = [str(name) for name in content]
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path} has two tensors of one name: save it again.")
    return {str(name): _tensor(path, str(name), v, records) for name, v in content.items()}


def _records(file: BinaryIO, path: Path) -> dict[str, Record]:
    """Return the records by name without the common folder; refuse a file that is not a complete
    zip of uncompressed records on little-endian machines."""
    if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
        raise UnsupportedError(
            f"{path} is not a zip file written by torch.save: it is damaged, or it was saved "
            "in the format before PyTorch 1.6, which cannot be read without loading it whole; "
            "load it with torch.load(..., weights_only=True) and torch.save it again."
        )
    try:
        records = read_records(file)
    except CompressedError:
        raise UnsupportedError(
            f"{path} is compressed, which torch.save never does: save it again."
        ) from None
    except ZipError as error:
        raise CheckpointError(
            f"{path} is truncated or damaged: download it again ({error})."
        ) from None
    folders = [name.removesuffix(_PICKLE) for name in records if name.endswith(_PICKLE)]
    if len(folders) != 1 or "/" in folders[0]:
        raise CheckpointError(f"{path} is a zip file, but not one of torch.save: save it again.")
    start = f"{folders[0]}/"
    records = {n.removeprefix(start): r for n, r in records.items() if n.startswith(start)}
    order = records.get("byteorder")
    if order and _read(file, order, len("little")) != b"little":
        raise UnsupportedError(f"{path} is big-endian: save it again on a little-endian machine.")
    return records


def _read(file: BinaryIO, record: Record, most: int) -> bytes:
    file.seek(record.offset)
    return file.read(min(record.size, most))


def _content(file: BinaryIO, records: dict[str, Record], path: Path) -> Any:
    pickled = records[_PICKLE[1:]]
    if pickled.size > MAX_BYTES:
        raise CheckpointError(
            f"{path} describes its tensors in {pickled.size:,} bytes, which no state dict needs: "
            "save the weights alone."
        )
    try:
        return read_pickle(_read(file, pickled, MAX_BYTES))
    except ForeignError as error:
        raise CheckpointError(
            f"{path} asks for {', '.join(error.args[:10])} when it is unpickled, which could run "
            "any code: none was run, and the file was not loaded; use a safetensors file instead."
        ) from None
    except PickleError as error:
        raise CheckpointError(
            f"{path} is not a state dict, or it is damaged ({error}): download it again."
        ) from None


def _tensor(path: Path, name: str, value: Any, records: dict[str, Record]) -> LazyTensor:
    check_name(path, name)
    if not isinstance(value, Described):
        kind = getattr(value, "name", type(value).__name__)
        if kind.startswith("torch._utils._rebuild_"):
            raise UnsupportedError(f"{path}: {name} is not stored as plain numbers: save it dense.")
        raise CheckpointError(
            f"{path}: {name} is {kind[:200]}, not a tensor: the file is not a state dict."
        )
    if not value.plain:
        raise UnsupportedError(f"{path}: {name} is not stored as plain numbers: save it dense.")
    record = records.get(f"data/{value.storage.key}")
    if record is None or value.storage.nbytes > record.size:
        raise CheckpointError(f"{path} lacks bytes of {name}: download it again.")
    count, size = math.prod(value.shape), value.itemsize
    last = value.offset + _span(value.shape, value.strides) if count else 0
    # An expanded tensor reads its storage more than once; no checkpoint has one.
    if last * size > value.storage.nbytes or count * size > path.stat().st_size:
        raise CheckpointError(
            f"{path}: {name} {list(value.shape)} is larger than its storage: download it again."
        )
    if value.dtype not in _DTYPES or value.shape == ():
        problem = describe_unreadable(path, name, value.dtype)
        refuse = partial(_refuse_rows, problem)
        nbytes = count * size
        return LazyTensor(name, value.shape, value.dtype, nbytes, refuse, problem=problem)
    code, dtype = _DTYPES[value.dtype]
    begin = record.offset + value.offset * size
    # The stride of a dimension of one element can be anything: it is never taken.
    strides = tuple(s if d > 1 else 0 for d, s in zip(value.shape, value.strides, strict=True))
    rows = partial(_read_rows, path, dtype, begin, value.shape, strides)
    return LazyTensor(name, value.shape, code, count * size, rows)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many elements the storage has from the tensor's first to its last, inclusive."""
    if 0 in shape:
        return 0
    return 1 + sum((dim - 1) * stride for dim, stride in zip(shape, strides, strict=True))


def _read_rows(
    path: Path,
    dtype: np.dtype[Any],
    begin: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    start: int,
    stop: int,
) -> Float32:
    """Return rows [start, stop) of a tensor whose first element is at byte `begin`. The rows of a
    transposed tensor are spread over all of it, so nearly the whole tensor is read for them."""
    wanted = (stop - start, *shape[1:])
    count = _span(wanted, strides)
    offset = begin + start * strides[0] * dtype.itemsize
    data: npt.NDArray[np.uint8] = np.fromfile(path, np.uint8, count * dtype.itemsize, offset=offset)
    if data.size < count * dtype.itemsize:
        raise CheckpointError(f"{path} ends too early: it changed since it was opened.")
    steps = [stride * dtype.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(data.view(dtype), wanted, steps)
    return widen(np.ascontiguousarray(view))


def _refuse_rows(problem: str, start: int, stop: int) -> Float32:
    raise UnsupportedError(problem)
