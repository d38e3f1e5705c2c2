"""compressed-tensors' layouts, as llm-compressor writes them.

For a linear layer of K inputs and N outputs in G groups, with c = 32 / bits codes in an int32:

    weight_packed      [N, K / c]   pack-quantized: bits (k % c) * bits of word k // c for input k
    weight             [N, K]       int-quantized, naive-quantized: one code in an int8
    weight_scale       [N, G]       [1] with the strategy "tensor"
    weight_zero_point  [N / c, G]   packed along the output; as codes in int8 [N, G] (or [1]) beside
                                    `weight` and with the strategy "tensor"; none if symmetric
    weight_shape       [2]          N and K, beside `weight_packed`
    weight_g_idx       [K]          group of each input channel; only after act-order by group

A code in an int8 is signed. Packed ones, and packed zero points, have 2^(bits-1) added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.exporter.checkpoints.quantized.compressed_config import (
    PACKED,
    CompressedConfig,
    Scheme,
    Targets,
)
from llama_onnx.exporter.checkpoints.quantized.folder import (
    QuantizedCheckpoint,
    check_names,
    stored_in_model,
)
from llama_onnx.exporter.checkpoints.quantized.packed import (
    CODES,
    SCALES,
    Bytes,
    Contents,
    Groups,
    PackedMatrix,
    check_tensor,
)
from llama_onnx.exporter.checkpoints.quantized.settings import WHOLE_ROW
from llama_onnx.exporter.formats.tensor import StoredTensor, widen
from llama_onnx.exporter.model.storage import pack, unpack
from llama_onnx.targets.errors import CheckpointError

_SIGNED = ("I8",)

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
"""The tensors of a quantized module, besides `weight`."""

_ACTIVATIONS = tuple(
    f".{value}_{part}"
    for value in ("input", "output", "q", "k", "v")
    for part in ("scale", "zero_point", "global_scale")
)
"""The tensors with which activations and the KV cache are quantized."""


@dataclass(frozen=True)
class Described:
    """Bits per code and description of a checkpoint with several schemes."""

    bits: int
    schemes: tuple[Scheme, ...]

    def describe(self) -> str:
        """Return the schemes, the most frequent first, for display."""
        return "compressed-tensors " + "; ".join(scheme.describe() for scheme in self.schemes)


def open_compressed(plain: HuggingFaceCheckpoint, config: CompressedConfig) -> QuantizedCheckpoint:
    """Return the quantized checkpoint in the folder of `plain`, in which codes are integer tensors.
    Reads headers only.

    Raises `CheckpointError` for a module whose tensors contradict one another or the
    configuration, `UnsupportedError` for weights that are not safetensors or a quantized embedding
    or tied head.
    """
    stored, targets = stored_in_model(plain), Targets(config)
    ending, shapes = ".weight_scale", plain.config.tensor_shapes()
    modules = [name.removesuffix(ending) for name in stored if name.endswith(ending)]
    schemes: Counter[Scheme] = Counter()
    packed = {}
    for module in modules:
        scheme = targets.scheme_of(module)
        if scheme is None:
            raise CheckpointError(
                f"{plain.path} has {module}.weight_scale, but no scheme in {config.where} is for "
                f"{module}: config and weights belong to different models."
            )
        schemes[scheme] += 1
        shape = shapes.get(f"{module}.weight")
        packed[f"{module}.weight"] = _open(_Parts(module, stored, scheme, config), shape)
    if not packed:
        raise CheckpointError(
            f"{config.where} specifies compressed-tensors, but no tensor in {plain.path} is "
            "quantized: config and weights belong to different models."
        )
    floats = {name for name, tensor in plain.tensors.items() if tensor.dtype not in _SIGNED}
    check_names(plain, packed, floats)
    taken = {f"{module}.{part}" for module in modules for part in _PARTS}
    rest = {
        name: tensor
        for name, tensor in plain.tensors.items()
        if name not in taken | packed.keys() and not name.endswith(_ACTIVATIONS)
    }
    sizes = Counter(matrix.bits for matrix in packed.values())
    return QuantizedCheckpoint(
        plain.path,
        plain.config,
        rest,
        plain.shards,
        plain.generation,
        (*plain.notes, *config.warnings),
        quantization=Described(
            max(sizes, key=sizes.__getitem__), tuple(scheme for scheme, _ in schemes.most_common())
        ),
        packed=packed,
        reads_whole=False,
    )


@dataclass(frozen=True)
class _Parts:
    """The tensors of one quantized module, not read yet, and its scheme."""

    module: str
    stored: Mapping[str, StoredTensor]
    scheme: Scheme
    config: CompressedConfig

    def maybe(self, part: str) -> StoredTensor | None:
        return self.stored.get(f"{self.module}.{part}")

    def need(self, part: str) -> StoredTensor:
        found = self.maybe(part)
        if found is None:
            name = f"{self.module}.weight_scale"
            raise CheckpointError(
                f"{self.stored[name].path} has {name}, but no {self.module}.{part}, which the "
                f"scheme in {self.config.where} requires: a file is missing, or config and weights "
                "belong to different models."
            )
        return found

    @property
    def is_packed(self) -> bool:
        return self.scheme.format == PACKED

    @property
    def codes(self) -> StoredTensor:
        return self.need("weight_packed" if self.is_packed else "weight")

    @property
    def zeros(self) -> StoredTensor | None:
        return None if self.scheme.symmetric else self.need("weight_zero_point")

    @property
    def nbytes(self) -> int:
        found = (self.maybe(part) for part in ("weight", *_PARTS))
        return sum(part.nbytes for part in found if part)


def _open(parts: _Parts, shape: tuple[int, ...] | None) -> PackedMatrix:
    """Return the matrix of `parts`, which is one of the model's if it has a `shape` there."""
    codes, scheme = parts.codes, parts.scheme
    check_tensor(codes, (None, None), CODES if parts.is_packed else _SIGNED)
    outputs, stored = codes.shape
    inputs = stored * (32 // scheme.bits) if parts.is_packed else stored
    if parts.is_packed and shape is not None and 0 <= inputs - shape[1] < 32 // scheme.bits:
        inputs = shape[1]  # the last word of a row is padded
    groups = _check_parts(parts, outputs, inputs)
    return PackedMatrix(
        f"{parts.module}.weight",
        codes.path,
        parts.nbytes,
        (outputs, inputs),
        scheme.bits,
        groups,
        scheme.symmetric,
        parts.need("weight_scale").code == "F16",
        partial(_read, parts, (outputs, inputs)),
    )


def _check_parts(parts: _Parts, outputs: int, inputs: int) -> Groups:
    """Check types and shapes of all tensors but the codes; return which channels share a scale."""
    scheme, g_idx = parts.scheme, parts.maybe("weight_g_idx")
    size = inputs if scheme.group_size == WHOLE_ROW else min(scheme.group_size, inputs)
    count = -(-inputs // size)
    single = () if not parts.need("weight_scale").shape else (1,)
    table = single if scheme.one_scale else (outputs, count)
    check_tensor(parts.need("weight_scale"), table, SCALES)
    if parts.zeros and parts.is_packed and not scheme.one_scale:
        check_tensor(parts.zeros, (-(-outputs * scheme.bits // 32), count), CODES)
    elif parts.zeros:
        check_tensor(parts.zeros, table, _SIGNED)
    if parts.is_packed:
        check_tensor(parts.need("weight_shape"), (2,), ("I32", "I64"))
    if g_idx is not None:
        check_tensor(g_idx, (inputs,), ("I32", "I64"))
    return Groups(inputs, size, g_idx, parts.config.where, may_reorder=True)


def _read(parts: _Parts, shape: tuple[int, int]) -> Contents:
    codes, scheme, (outputs, inputs) = parts.codes, parts.scheme, shape
    _check_values(parts, shape)
    width = -(-inputs * scheme.bits // 8)

    def packed(start: int, stop: int) -> Bytes:
        words = np.ascontiguousarray(codes.values(start, stop), "<i4")
        return words.view(np.uint8)[:, :width]

    def signed(start: int, stop: int) -> Bytes:
        return pack(_unsigned(codes, codes.values(start, stop), scheme.bits), scheme.bits)

    scales = widen(parts.need("weight_scale").read())
    zeros = None if parts.zeros is None else _zero_points(parts.zeros, scheme, outputs)
    if scheme.one_scale:
        scales = np.broadcast_to(scales.reshape(1, 1), (outputs, 1))
        zeros = None if zeros is None else np.broadcast_to(zeros.reshape(1, 1), (outputs, 1))
    return Contents(packed if parts.is_packed else signed, zeros, scales)


def _check_values(parts: _Parts, shape: tuple[int, int]) -> None:
    """Compare the tensors whose values have to match headers and settings."""
    if parts.is_packed:
        tensor = parts.need("weight_shape")
        if (found := tensor.read().tolist()) != list(shape):
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is {found}, but {parts.codes.name} holds a matrix "
                f"of {list(shape)}: the file is damaged, or config.json is of another model."
            )
    zeros = parts.maybe("weight_zero_point")
    if parts.scheme.symmetric and zeros is not None and zeros.read().any():
        raise CheckpointError(
            f"{zeros.path}: {zeros.name} is not zero, but the scheme in {parts.config.where} is "
            "symmetric: set symmetric to false there, or quantize again."
        )


def _zero_points(zeros: StoredTensor, scheme: Scheme, outputs: int) -> Bytes:
    """Return the zero points [N, G], or [1]."""
    if zeros.code in _SIGNED:
        return _unsigned(zeros, zeros.read(), scheme.bits)
    across = np.ascontiguousarray(zeros.read().T, "<i4").view(np.uint8)  # [G, bytes]
    return np.ascontiguousarray(unpack(across, scheme.bits)[:, :outputs].T)


def _unsigned(tensor: StoredTensor, values: npt.NDArray[Any], bits: int) -> Bytes:
    """Return signed codes with 2^(bits-1) added; raises `CheckpointError` for one out of range."""
    half = 1 << (bits - 1)
    if bits < 8 and values.size and (values.min() < -half or values.max() >= half):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} has codes beyond {bits} bits: the file is damaged, or "
            "num_bits in config.json is wrong."
        )
    return values.astype(np.uint8) + np.uint8(half)
