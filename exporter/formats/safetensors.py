"""Safetensors files and the location of each tensor in them.

The library is not used: `safe_open` maps the whole file as long as it is open, and every page read
stays resident, so memory would grow with the model. The format (8-byte little-endian header length,
JSON header, data) is published at
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_onnx.exporter.formats.tensor import LazyTensor, StoredTensor
from llama_onnx.targets.errors import CheckpointError

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),  # for the codes of a quantized checkpoint
    "I64": np.dtype("<i8"),
}
_MAX_HEADER = 100_000_000  # the limit set by the format


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file by name, without reading their values; raises
    `CheckpointError` for a damaged header."""
    return {name: stored.lazy() for name, stored in stored_tensors(path).items()}


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the location of each tensor of a safetensors file by name; raises `CheckpointError`
    for a damaged header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is not a whole safetensors file (its header extends past the end of "
                    "the file): download it again."
                )
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("not an object")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise CheckpointError(
            f"{path} is not a safetensors file (its header is not JSON): download it again."
        ) from None
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> StoredTensor:
    try:
        code, shape = str(entry["dtype"]), tuple(int(dim) for dim in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: the header's entry for {name} is damaged: download it again."
        ) from None
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {base + end:,}, but the file has {size:,} "
            "bytes; download it again."
        )
    dtype = _DTYPES.get(code)
    if dtype is not None and end - begin != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise CheckpointError(
            f"{path}: {name} has {end - begin:,} bytes, which does not match its shape: "
            "download it again."
        )
    return StoredTensor(path, name, shape, code, dtype, base + begin, end - begin)
