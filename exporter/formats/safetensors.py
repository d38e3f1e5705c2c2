"""Safetensors files and the location of each tensor in them.

The library is not used: `safe_open` maps the whole file as long as it is open, and every page read
stays resident, so memory would grow with the model. The format (8-byte little-endian header length,
JSON header, data) is published at
https://github.com/huggingface/safetensors#format. What the library refuses is refused here too, and
a little more: fields of an entry that the format does not define, and names used twice.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama_onnx.exporter.formats.placeholder import refuse_placeholder_file
from llama_onnx.exporter.formats.tensor import LazyTensor, StoredTensor, check_name
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import JSONError, parse_json

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),  # for the codes of a quantized checkpoint
    "I64": np.dtype("<i8"),
}
_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""Type -> bits of an element, for all types of the format."""

_MAX_HEADER = 32 << 20
"""In bytes. The format allows 100 MB; the shards of DeepSeek V3 have 0.1 MB each."""

_MAX_TENSORS = 100_000  # in one file: Llama 3.1 405B has 1,138 in all
_MAX_COUNT = (1 << 64) - 1
_FIELDS = {"dtype", "shape", "data_offsets"}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a safetensors file by name, without reading their values; raises
    `CheckpointError` for a damaged header."""
    return {name: stored.lazy() for name, stored in stored_tensors(path).items()}


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the location of each tensor of a safetensors file by name; raises `CheckpointError`
    for a damaged header."""
    try:
        with path.open("rb") as file:
            refuse_placeholder_file(path, file)
            size = os.fstat(file.fileno()).st_size
            content = _header(file, size, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    base = 8 + len(content)
    try:
        if not content.startswith(b"{"):  # nor a byte order mark
            raise JSONError("does not begin with {")
        if content.count(b"{") > _MAX_TENSORS + 2:  # counted before they are parsed
            raise JSONError(f"has more than {_MAX_TENSORS:,} tensors")
        header = parse_json(content, unique=True)
    except JSONError as error:
        raise CheckpointError(
            f"{path} is not a safetensors file (its header {error}): download it again."
        ) from None
    _check_metadata(header.pop("__metadata__", None), path)
    stored = {name: _stored(path, name, entry, base, size) for name, entry in header.items()}
    _check_layout(stored.values(), path, base, size)
    return stored


def _header(file: BinaryIO, size: int, path: Path) -> bytes:
    """Return the bytes of the header."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > size - 8:
        raise CheckpointError(
            f"{path} is not a whole safetensors file (its header extends past the end of "
            "the file): download it again."
        )
    if length > _MAX_HEADER:
        raise CheckpointError(
            f"{path} has a header of {length:,} bytes, which no Llama needs: download it again."
        )
    return file.read(length)


def _check_metadata(metadata: Any, path: Path) -> None:
    texts = metadata is None or (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    )
    if not texts:
        raise CheckpointError(f"{path}: __metadata__ in its header is damaged: download it again.")


def _stored(path: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    check_name(path, name)
    fields = entry if isinstance(entry, dict) and entry.keys() == _FIELDS else dict[str, Any]()
    code, shape = fields.get("dtype"), _counts(fields.get("shape"))
    offsets = _counts(fields.get("data_offsets"))
    if not isinstance(code, str) or shape is None or offsets is None or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: the header's entry for {name} is damaged: download it again."
        )
    begin, end = offsets
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {base + end:,}, but the file has {size:,} "
            "bytes; download it again."
        )
    if code not in _BITS:
        raise CheckpointError(
            f"{path}: {name} is stored as {shown(code)}, which safetensors does not define."
        )
    bits = _product(shape, path, name) * _BITS[code]
    if 8 * (end - begin) != bits:
        raise CheckpointError(
            f"{path}: {name} has {end - begin:,} bytes, which does not match its shape: "
            "download it again."
        )
    return StoredTensor(path, name, shape, code, _DTYPES.get(code), base + begin, end - begin)


def _counts(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > 32:
        return None
    if not all(type(item) is int and 0 <= item <= _MAX_COUNT for item in value):
        return None
    return tuple(value)


def _product(shape: Iterable[int], path: Path, name: str) -> int:
    count = 1
    for dim in shape:
        count *= dim
        if count > _MAX_COUNT // 64:  # even if a later dimension is 0: the library refuses it
            raise CheckpointError(f"{path}: {name} has too many elements: download it again.")
    return count


def _check_layout(tensors: Iterable[StoredTensor], path: Path, base: int, size: int) -> None:
    """Raise `CheckpointError` unless the tensors cover the whole file and do not overlap."""
    end = base
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            how = "overlaps another tensor" if tensor.offset < end else "does not follow another"
            raise CheckpointError(f"{path}: {tensor.name} {how}: download it again.")
        end += tensor.nbytes
    if end != size:
        raise CheckpointError(
            f"{path} has {size - end:,} bytes that belong to no tensor: download it again."
        )
