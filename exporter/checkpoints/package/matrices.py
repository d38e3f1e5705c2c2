"""Matrices of a graph, read back row by row: the weights that its operators compute with.

This code follows only the operators' specifications and shares nothing with the quantizer, so that
a mistake there is not repeated here:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
(`com.microsoft.MatMulNBits`, `com.microsoft.GatherBlockQuantized`) and
https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from llama_onnx.exporter.formats.tensor import Bounds, Float32
from llama_onnx.runtime.measure.block_codes import dequantize, unpack
from llama_onnx.targets.errors import PackageError, UnsupportedError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.package import MODEL_FILE

# The input that holds the codes; the scales are input 2 of both operators.
_CODES_INPUT = {"MatMulNBits": 1, "GatherBlockQuantized": 0}

_BITS = (2, 4, 8)

Initializers = Mapping[str, "Initializer"]
Producers = Mapping[str, onnx.NodeProto]
"""A value's name -> the node that produces it."""


@dataclass(frozen=True)
class Initializer:
    """A tensor of the graph: at byte `offset` of `file`, or `inline` in model.onnx if small."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path
    offset: int
    inline: npt.NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file; two 4-bit codes share one."""
        values = prod(self.shape)
        return -(-values // 2) if self.dtype == ml_dtypes.int4 else values * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return rows [stop - start, ...]."""
        if self.inline is not None:
            return self.inline[start:stop]
        width = self.nbytes // self.shape[0]
        raw = np.fromfile(
            self.file, np.uint8, count=(stop - start) * width, offset=self.offset + start * width
        )
        return raw.view(self.dtype).reshape(stop - start, *self.shape[1:])

    def columns(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return columns [rows, stop - start] of a matrix; 4-bit codes become one per byte."""
        if self.inline is not None:
            return self.inline[:, start:stop]
        if self.dtype != ml_dtypes.int4:
            mapped = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
            return np.array(mapped[:, start:stop])
        # Packed contiguously, the first of two in the low nibble; a row may begin in either nibble.
        packed = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        rows, width = self.shape
        flat = np.arange(rows)[:, None] * width + np.arange(start, stop)  # [rows, stop - start]
        nibbles = packed[flat >> 1] >> (4 * (flat & 1)).astype(np.uint8) & 0xF
        return np.asarray((nibbles ^ 8).astype(np.int8) - np.int8(8))


@dataclass(frozen=True)
class Scales:
    """Scales [N, blocks] as the graph makes them: the first of `factors`, as float32, times the
    second, [N, 1], if there is one."""

    factors: tuple[Initializer, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(factor.nbytes for factor in self.factors)

    def fits(self, rows: int, blocks: int) -> bool:
        """Return whether the factors have the shapes of scales [rows, blocks]."""
        shapes = [factor.shape for factor in self.factors]
        return shapes == [(rows, blocks), (rows, 1)][: len(shapes)]

    def rows(self, start: int, stop: int) -> Float32:
        """Return rows [stop - start, blocks]."""
        first, *others = (f.rows(start, stop).astype(np.float32) for f in self.factors)
        return first * others[0] if others else first


@dataclass(frozen=True)
class MatMulBlocks:
    """A quantized matrix [N, K] as `com.microsoft`'s operators read it. `order` has the input
    channel of each column if a Gather before the operator reorders them, else None."""

    codes: Initializer
    scales: Scales
    zero_points: Initializer | None
    order: Initializer | None
    bits: int
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        zeros = self.zero_points.nbytes if self.zero_points else 0
        return self.codes.nbytes + self.scales.nbytes + zeros

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether all parts have the shapes of a [rows, columns] matrix."""
        blocks = -(-columns // self.block_size)  # per row
        zeros, order = self.zero_points, self.order
        return (
            self.codes.shape[0] == rows
            and self.codes.nbytes == rows * blocks * self.block_size * self.bits // 8
            and self.scales.fits(rows, blocks)
            and (zeros is None or zeros.shape == (rows, -(-blocks * self.bits // 8)))
            and (order is None or order.shape == (columns,))
        )

    def bounds(self, start: int, stop: int) -> Bounds | None:
        """Return the values of the lowest and the highest code of each block of some rows,
        [R, blocks]; None if the columns are not in the order of the channels."""
        if self.order is not None:
            return None
        scales = self.scales.rows(start, stop)
        zeros: Float32 | np.float32 = np.float32(2 ** (self.bits - 1))
        if self.zero_points is not None:
            packed = unpack(self.zero_points.rows(start, stop), self.bits)
            zeros = packed[:, : scales.shape[1]].astype(np.float32)
        ends = -zeros * scales, (np.float32(2**self.bits - 1) - zeros) * scales
        return np.minimum(*ends), np.maximum(*ends)

    def rows(self, start: int, stop: int, columns: int) -> Float32:
        """Rows [stop - start, columns], dequantized."""
        scales = self.scales.rows(start, stop)
        codes = self.codes.rows(start, stop)
        zeros = self.zero_points.rows(start, stop) if self.zero_points else None
        values = dequantize(codes, scales, self.bits, self.block_size, columns, zeros)
        if self.order is None:
            return values
        order = self.order.rows(0, columns)
        if not np.array_equal(np.sort(order), np.arange(columns)):
            raise PackageError(
                f"{self.order.file}: {self.order.name} is not an order of {columns} channels: copy "
                "or export the package again."
            )
        found = np.empty_like(values)
        found[:, order] = values
        return found


@dataclass(frozen=True)
class DequantizedColumns:
    """A quantized matrix [N, K] as DequantizeLinear reads it for a MatMul: signed codes [K, N],
    scales [blocks, N]."""

    codes: Initializer
    scales: Initializer
    bits: int
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def fits(self, rows: int, columns: int) -> bool:
        """Return whether both have the shapes of a [rows, columns] matrix."""
        blocks = -(-columns // self.block_size)
        return self.codes.shape == (columns, rows) and self.scales.shape == (blocks, rows)

    def bounds(self, start: int, stop: int) -> Bounds | None:
        """Return the values of the lowest and the highest code of each block of some rows,
        [R, blocks]."""
        scales = self.scales.columns(start, stop).astype(np.float32).T
        half = np.float32(2 ** (self.bits - 1))
        ends = -half * scales, (half - 1) * scales
        return np.minimum(*ends), np.maximum(*ends)

    def rows(self, start: int, stop: int, columns: int) -> Float32:
        """Rows [stop - start, columns], dequantized."""
        codes = self.codes.columns(start, stop).astype(np.float32)  # [K, rows]
        scales = self.scales.columns(start, stop).astype(np.float32)  # [blocks, rows]
        values = codes * np.repeat(scales, self.block_size, axis=0)[:columns]
        return np.ascontiguousarray(values.T)


CodedRows = MatMulBlocks | DequantizedColumns


def read_initializer(path: Path, proto: onnx.TensorProto) -> Initializer:
    """Return the initializer `proto` of the graph in the folder `path`; raises `PackageError` if
    its data is missing or truncated."""
    shape, dtype = tuple(proto.dims), onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        inline = onnx.numpy_helper.to_array(proto)
        return Initializer(proto.name, shape, dtype, path / MODEL_FILE, 0, inline)
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    # A location that contains a folder could point anywhere on the disk.
    if not location or Path(location).name != location:
        raise PackageError(
            f"{path}: {proto.name} is in {location!r}, which is not a file of the package: "
            "copy or export the package again."
        )
    file = file_inside(path, location, PackageError)
    size = file.stat().st_size if file else -1
    offset = int(entries.get("offset", 0))
    found = Initializer(proto.name, shape, dtype, path / location, offset)
    if found.offset + found.nbytes > size:
        state = "is missing" if size < 0 else f"ends at byte {size:,}"
        raise PackageError(
            f"{found.file} {state}, but {proto.name} reaches byte "
            f"{found.offset + found.nbytes:,}: copy or export the package again."
        )
    return found


def coded_rows(
    node: onnx.NodeProto, stored: Initializers, made_by: Producers, path: Path
) -> CodedRows | None:
    """Return the quantized matrix that `node` reads; None if it reads none.

    Raises `PackageError` if its codes or scales are not initializers, `UnsupportedError` for a
    format that cannot be read back.
    """
    if node.op_type == "DequantizeLinear":
        return _columns(node, stored, made_by, path)
    if node.op_type not in _CODES_INPUT:
        return None
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    bits, size = attributes.get("bits", 4), attributes.get("block_size", 128)
    zeros = node.input[3] if len(node.input) > 3 else ""
    if any(node.input[4:]) or bits not in _BITS:
        raise UnsupportedError(
            f"{path}: {node.name or node.op_type} has {bits} bits and the additional inputs "
            f"{list(node.input[4:])}; only 2, 4 and 8 bits without them can be read back."
        )
    scales = Scales(tuple(_factors(node.input[2], stored, made_by)))
    try:
        codes = stored[node.input[_CODES_INPUT[node.op_type]]]
        zero_points = stored[zeros] if zeros else None
    except KeyError as error:
        raise PackageError(
            f"{path}: {node.name} reads {error}, which is not an initializer: export the package "
            "again."
        ) from None
    if not scales.factors or len(scales.factors) > 2:
        raise PackageError(
            f"{path}: {node.name} reads the scales {node.input[2]!r}, which are not made of "
            "initializers: export the package again."
        )
    before = made_by.get(node.input[0])
    gathered = before is not None and before.op_type == "Gather"
    order = stored.get(before.input[1]) if before and gathered else None
    return MatMulBlocks(codes, scales, zero_points, order, bits, size)


def _factors(name: str, stored: Initializers, made_by: Producers) -> Iterator[Initializer]:
    """Yield the initializers whose product is the value `name`: itself, or what a Mul multiplies,
    each perhaps as float32 after a Cast. Yields none for anything else."""
    made = made_by.get(name)
    names = list(made.input) if made is not None and made.op_type == "Mul" else [name]
    found = []
    for factor in names:
        cast = made_by.get(factor)
        if cast is not None and cast.op_type == "Cast" and cast.input:
            to = next((a.i for a in cast.attribute if a.name == "to"), None)
            factor = cast.input[0] if to == onnx.TensorProto.FLOAT else ""
        found.append(stored.get(factor))
    if None not in found:
        yield from (initializer for initializer in found if initializer is not None)


def _columns(
    node: onnx.NodeProto, stored: Initializers, made_by: Producers, path: Path
) -> DequantizedColumns:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    codes, scales = (_gathered_from(name, stored, made_by) for name in node.input[:2])
    bits = {"int4": 4, "int8": 8}.get(codes.dtype.name) if codes else None
    if codes is None or scales is None:
        raise PackageError(
            f"{path}: {node.name} reads codes or scales that are not initializers: "
            "export the package again."
        )
    if attributes.get("axis") != 0 or any(node.input[2:]) or bits is None:
        raise UnsupportedError(
            f"{path}: {node.name} dequantizes {codes.dtype.name} along axis "
            f"{attributes.get('axis', 1)}; only signed codes of 4 and 8 bits along axis 0, without "
            "zero points, can be read back."
        )
    return DequantizedColumns(codes, scales, bits, attributes.get("block_size", 0))


def _gathered_from(name: str, stored: Initializers, made_by: Producers) -> Initializer | None:
    """Return the initializer `name`, or the one whose columns are gathered into `name`."""
    maker = made_by.get(name)
    return stored.get(maker.input[0] if maker and maker.op_type == "Gather" else name)
