"""A finished package read back as a checkpoint: the weights its graph computes with, dequantized.

Written from the operators' specifications alone, and sharing no code with the quantizer, so that a
mistake there cannot hide by being made twice:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
(`com.microsoft.MatMulNBits`, `com.microsoft.GatherBlockQuantized`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from llama_onnx.exporter.checkpoints.base import (
    Float32,
    LazyTensor,
    TensorsByName,
    check_tensors,
    file_fingerprint,
    find_licences,
)
from llama_onnx.exporter.config import LlamaConfig, config_from_huggingface, read_json
from llama_onnx.targets.errors import CheckpointError, PackageError, UnsupportedError
from llama_onnx.targets.package import MODEL_FILE

PRECISIONS = ("int4", "int8", "bf16", "fp16", "fp32")
"""From the coarsest to the finest."""

# The input that holds the codes; the scales are input 2 of both operators.
_CODES_INPUT = {"MatMulNBits": 1, "GatherBlockQuantized": 0}

# Matrices the graph multiplies by in one go: their rows stand one behind the other.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

_FLOAT_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PRECISION_OF = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "INT8": "int8", "INT4": "int4"}

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class PackageCheckpoint(TensorsByName):
    """A package folder; `tensors` maps Hugging Face names to dequantized, lazy rows.

    `config.tie_word_embeddings` is False as soon as the graph has a head of its own, even over the
    same bytes: what is compared is what each operator reads.
    """

    path: Path
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    activations: str = "fp32"
    """What they are rounded to in front of a quantized matrix: "fp32" (not at all), "int8"."""
    format: str = "package"

    @classmethod
    def open(cls, path: Path) -> PackageCheckpoint:
        """Read config.json and model.onnx, not the weights.

        Raises `PackageError` for a file that is missing or damaged, or for weights that are not
        where the config asks for them; `UnsupportedError` for a quantization not known here.
        """
        if not (path / MODEL_FILE).is_file():
            raise PackageError(f"{path} has no {MODEL_FILE}: is this a model package?")
        config = config_from_huggingface(read_json(path / "config.json"), str(path / "config.json"))
        graph = load_model(path).graph
        stored = {i.name: _initializer(path, i) for i in graph.initializer}
        made_by = {output: node for node in graph.node for output in node.output}
        blocks = {
            found.codes.name: found
            for found in (_blocks(node, stored, made_by, path) for node in graph.node)
            if found
        }
        has_head = any(name.startswith("lm_head.") for name in stored)
        config = replace(config, tie_word_embeddings=not has_head)
        tensors = {
            name: _tensor(name, config, stored, blocks, path) for name in config.tensor_shapes()
        }
        checkpoint = cls(path, config, tensors, _activations(graph))
        check_tensors(checkpoint)
        return checkpoint

    @property
    def precision(self) -> str:
        """The coarsest of `PRECISIONS` that a matrix of the package is stored in."""
        codes = {t.dtype.partition("/")[0] for t in self.tensors.values() if len(t.shape) == 2}
        return min((_PRECISION_OF[code] for code in codes), key=PRECISIONS.index)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy the tokenizer's files."""
        if not (self.path / "tokenizer.json").exists():
            raise CheckpointError(f"{self.path} has no tokenizer.json: export the package again.")
        names = [name for name in _TOKENIZER_FILES if (self.path / name).exists()]
        for name in names:
            shutil.copyfile(self.path / name, folder / name)
        return names

    def licence_files(self) -> Sequence[Path]:
        """Licence, policy, notice and model card that travelled with the package."""
        return find_licences(self.path)

    def search_defaults(self) -> dict[str, Any]:
        """None: a package keeps them in genai_config.json, in genai's own terms."""
        return {}

    def fingerprint(self) -> dict[str, str]:
        """Size and modification time of config, graph and data."""
        files = [self.path / "config.json", *self.path.glob(f"{MODEL_FILE}*")]
        return file_fingerprint(files)


def load_model(package: Path) -> onnx.ModelProto:
    """The graph of `package` without its external data; raises `PackageError`."""
    path = package / MODEL_FILE
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise PackageError(f"{package} has no {MODEL_FILE}: is this a model package?") from None
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except DecodeError:
        raise PackageError(f"{path} is not an ONNX model: export the package again.") from None


def dequantize(
    codes: npt.NDArray[np.uint8],
    scales: Float32,
    bits: int,
    block_size: int,
    columns: int,
    zero_points: npt.NDArray[np.uint8] | None = None,
) -> Float32:
    """Block quantization undone: `(code - zero) * scale`.

    `codes` [N, ...] holds `ceil(columns / block_size)` whole blocks a row, packed low nibble first
    when `bits` is 4; `scales` is [N, blocks]. `zero_points` [N, ...] are packed likewise; without
    them zero is 2^(bits-1). Returns float32 [N, columns].
    """
    rows, blocks = scales.shape
    centred = _codes(codes, bits).astype(np.float32).reshape(rows, blocks, block_size)
    if zero_points is None:
        centred -= np.float32(2 ** (bits - 1))
    else:
        centred -= _codes(zero_points, bits)[:, :blocks, None]
    values = centred * scales[..., None]  # [N, blocks, block_size]
    return values.reshape(rows, -1)[:, :columns]  # the last block may be padded


def _activations(graph: onnx.GraphProto) -> str:
    """From MatMulNBits' accuracy_level: 4 allows int8, 2 and 3 half precision, 1 neither."""
    levels = (a.i for n in graph.node for a in n.attribute if a.name == "accuracy_level")
    return {4: "int8", 3: "bf16", 2: "fp16"}.get(max(levels, default=1), "fp32")


def _codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    flat = packed.reshape(len(packed), -1)
    if bits == 8:
        return flat
    return np.stack([flat & 0xF, flat >> 4], axis=-1).reshape(len(packed), -1)


@dataclass(frozen=True)
class _Initializer:
    """A tensor of the graph: `offset` in `file`, or small and inside model.onnx itself."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    file: Path
    offset: int
    inline: npt.NDArray[Any] | None = None

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        if self.inline is not None:
            return self.inline[start:stop]
        width = self.nbytes // self.shape[0]
        raw = np.fromfile(
            self.file, np.uint8, count=(stop - start) * width, offset=self.offset + start * width
        )
        return raw.view(self.dtype).reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class _Blocks:
    """A block-quantized matrix as one operator of the graph reads it. `order`: the channel of the
    input that each column is multiplied by, where a Gather in front rearranges them."""

    codes: _Initializer
    scales: _Initializer
    zero_points: _Initializer | None
    order: _Initializer | None
    bits: int
    block_size: int

    def rows(self, start: int, stop: int, columns: int) -> Float32:
        scales = self.scales.rows(start, stop).astype(np.float32)
        codes = self.codes.rows(start, stop)
        zeros = self.zero_points.rows(start, stop) if self.zero_points else None
        values = dequantize(codes, scales, self.bits, self.block_size, columns, zeros)
        if self.order is None:
            return values
        order = self.order.rows(0, columns)
        if not np.array_equal(np.sort(order), np.arange(columns)):
            raise PackageError(
                f"{self.order.file}: {self.order.name} is no order of {columns} channels: copy or "
                "export the package again."
            )
        found = np.empty_like(values)
        found[:, order] = values
        return found


def _initializer(path: Path, proto: onnx.TensorProto) -> _Initializer:
    shape, dtype = tuple(proto.dims), onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        inline = onnx.numpy_helper.to_array(proto)
        return _Initializer(proto.name, shape, dtype, path / MODEL_FILE, 0, inline)
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    # A location with a folder in it could point anywhere on the disk.
    if not location or Path(location).name != location:
        raise PackageError(
            f"{path}: {proto.name} lies in {location!r}, which is not a file of the package."
        )
    found = _Initializer(proto.name, shape, dtype, path / location, int(entries.get("offset", 0)))
    size = found.file.stat().st_size if found.file.exists() else -1
    if found.offset + found.nbytes > size:
        state = "is missing" if size < 0 else f"ends at byte {size:,}"
        raise PackageError(
            f"{found.file} {state}, but {proto.name} reaches byte "
            f"{found.offset + found.nbytes:,}: copy or export the package again."
        )
    return found


def _blocks(
    node: onnx.NodeProto,
    stored: dict[str, _Initializer],
    made_by: dict[str, onnx.NodeProto],
    path: Path,
) -> _Blocks | None:
    if node.op_type not in _CODES_INPUT:
        return None
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    bits, size = attributes.get("bits", 4), attributes.get("block_size", 128)
    zeros = node.input[3] if len(node.input) > 3 else ""
    known = 4 if node.op_type == "MatMulNBits" else 3  # inputs that are understood
    if any(node.input[known:]) or bits not in (4, 8):
        raise UnsupportedError(
            f"{path}: {node.name or node.op_type} is {bits}-bit with the further inputs "
            f"{list(node.input[known:])}; only 4 and 8 bits can be read back."
        )
    try:
        codes, scales = stored[node.input[_CODES_INPUT[node.op_type]]], stored[node.input[2]]
        zero_points = stored[zeros] if zeros else None
    except KeyError as error:
        raise PackageError(f"{path}: {node.name} reads {error}, which is no initializer.") from None
    before = made_by.get(node.input[0])
    gathered = before is not None and before.op_type == "Gather"
    order = stored.get(before.input[1]) if before and gathered else None
    return _Blocks(codes, scales, zero_points, order, bits, size)


def _tensor(
    name: str,
    config: LlamaConfig,
    stored: dict[str, _Initializer],
    blocks: dict[str, _Blocks],
    path: Path,
) -> LazyTensor:
    """Tensor `name`: whole, or as rows of a fused matrix."""
    shapes = config.tensor_shapes()
    for module, parts in modules_holding(name.removesuffix(".weight")):
        rows = [shapes[f"{part}.weight"][0] for part in parts]
        first = sum(rows[: parts.index(name.removesuffix(".weight"))])
        if f"{module}.qweight" in blocks:
            return _quantized(name, shapes[name], blocks[f"{module}.qweight"], first, sum(rows))
        if f"{module}.weight" in stored:
            return _float(name, shapes[name], stored[f"{module}.weight"], first, sum(rows))
    raise PackageError(f"{path}: the graph has no weights for {name}: export the package again.")


def modules_holding(module: str) -> Iterable[tuple[str, list[str]]]:
    """Modules of the graph that may hold `module`, each with the modules it is made of."""
    yield module, [module]
    for fused, parts in _FUSED.items():
        for part in parts:
            if module.endswith(f".{part}"):
                prefix = module.removesuffix(part)
                yield prefix + fused, [prefix + p for p in parts]


def _float(
    name: str, shape: tuple[int, ...], matrix: _Initializer, first: int, total: int
) -> LazyTensor:
    code = _FLOAT_CODES.get(matrix.dtype.name)
    if code is None or matrix.shape != (total, *shape[1:]):
        raise PackageError(
            f"{matrix.file.parent}: {matrix.name} is {matrix.dtype.name} {list(matrix.shape)}, "
            f"not a float tensor of shape {[total, *shape[1:]]}."
        )

    def rows(start: int, stop: int) -> Float32:
        return matrix.rows(first + start, first + stop).astype(np.float32)

    return LazyTensor(name, shape, code, matrix.nbytes * shape[0] // total, rows)


def _quantized(
    name: str, shape: tuple[int, ...], matrix: _Blocks, first: int, total: int
) -> LazyTensor:
    codes, scales, zeros = matrix.codes, matrix.scales, matrix.zero_points
    count = -(-shape[1] // matrix.block_size)  # blocks a row
    if (
        codes.shape[0] != total
        or codes.nbytes != total * count * matrix.block_size * matrix.bits // 8
        or scales.shape != (total, count)
        or (zeros and zeros.shape != (total, -(-count * matrix.bits // 8)))
        or (matrix.order and matrix.order.shape != shape[1:])
    ):
        raise PackageError(
            f"{codes.file.parent}: {codes.name} {list(codes.shape)} with scales "
            f"{list(scales.shape)} is not a {total} x {shape[1]} matrix of {matrix.bits} bits in "
            f"blocks of {matrix.block_size}."
        )

    def rows(start: int, stop: int) -> Float32:
        return matrix.rows(first + start, first + stop, shape[1])

    nbytes = (codes.nbytes + scales.nbytes + (zeros.nbytes if zeros else 0)) * shape[0] // total
    return LazyTensor(name, shape, f"INT{matrix.bits}/{matrix.block_size}", nbytes, rows)
