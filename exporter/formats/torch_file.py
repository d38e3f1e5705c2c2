"""Files written by `torch.save`: finds each tensor without reading its values or running code.

Such a file is a zip of uncompressed records: a pickle that describes the tensors, and the bytes of
each storage. The pickle is read by `torch.load` with `weights_only=True`, whose unpickler accepts
only tensors and containers, and under `FakeTensorMode`, which allocates nothing and records where
each storage begins (https://docs.pytorch.org/docs/stable/notes/serialization.html). Rows are then
read from the file, not mapped: every page of a mapped shard that was read would stay resident.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.formats.tensor import Float32, LazyTensor, describe_unreadable, widen
from llama_onnx.targets.errors import CheckpointError, UnsupportedError

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "torch.float64": ("F64", np.dtype("<f8")),
    "torch.float32": ("F32", np.dtype("<f4")),
    "torch.float16": ("F16", np.dtype("<f2")),
    "torch.bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
_ZIP_MAGIC = b"PK\x03\x04"


def read_torch_file(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of the state dict in `path` by name, without reading their values.

    Raises `CheckpointError` for a file that is damaged, holds something else or would run code;
    `UnsupportedError` for the format before PyTorch 1.6 and for tensors that cannot be read row by
    row.
    """
    _check_zip(path)
    content = _unpickle(path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"{path} holds {type(content).__name__} instead of a dict of tensors: it is not a "
            "state dict."
        )
    return {str(name): _tensor(path, str(name), value) for name, value in content.items()}


def _check_zip(path: Path) -> None:
    """Refuse a file that is not a complete zip of uncompressed records, before torch opens it."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP_MAGIC))
        if magic != _ZIP_MAGIC:
            raise UnsupportedError(
                f"{path} is not a zip file written by torch.save: it is damaged, or it was saved "
                "in the format before PyTorch 1.6, which cannot be read without loading it whole; "
                "load it with torch.load(..., weights_only=True) and torch.save it again."
            )
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            order = [archive.read(r) for r in records if r.filename.endswith("/byteorder")]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError):
        raise CheckpointError(f"{path} is truncated or damaged: download it again.") from None
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UnsupportedError(f"{path} is compressed, which torch.save never does: save it again.")
    if any(text != b"little" for text in order):
        raise UnsupportedError(f"{path} is big-endian: save it again on a little-endian machine.")


def _unpickle(path: Path) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not foreign:
            # With fake tensors no value is read. mmap=True would still map the file, and the system
            # may refuse a mapping larger than its memory.
            with FakeTensorMode():
                return torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle raises KeyError, IndexError, RuntimeError, UnicodeError and more.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{path} cannot be unpickled as a state dict ({reason[:200]}): download it again."
        ) from None
    raise CheckpointError(
        f"{path} asks for {', '.join(sorted(foreign))} when it is unpickled, which could run any "
        "code: none was run, and the file was not loaded; use a safetensors file instead."
    )


def _tensor(path: Path, name: str, value: Any) -> LazyTensor:
    import torch

    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{path}: {name} is {type(value).__name__}, not a tensor: the file is not a state dict."
        )
    if value.layout != torch.strided or value.is_quantized or value.is_conj() or value.is_neg():
        raise UnsupportedError(f"{path}: {name} is not stored as plain numbers: save it dense.")
    shape, strides = tuple(value.shape), value.stride()
    code, dtype = _DTYPES.get(str(value.dtype), (str(value.dtype).removeprefix("torch."), None))
    record = value.untyped_storage()._checkpoint_offset
    assert record is not None, "FakeTensorMode records it"
    begin = record + int(value.storage_offset()) * value.element_size()
    end = begin + _span(shape, strides) * value.element_size()
    size = path.stat().st_size
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {end:,}, but the file has {size:,} "
            "bytes; download it again."
        )
    nbytes = value.numel() * value.element_size()
    if dtype is None:
        problem = describe_unreadable(path, name, code)
        return LazyTensor(
            name, shape, code, nbytes, partial(_refuse_rows, problem), problem=problem
        )
    rows = partial(_read_rows, path, dtype, begin, shape, strides)
    return LazyTensor(name, shape, code, nbytes, rows)


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
