"""Reads a finished package back as a checkpoint: the weights that its graph computes with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from llama_onnx.exporter.checkpoints.package.matrices import (
    CodedRows,
    Initializer,
    coded_rows,
    read_initializer,
)
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.formats.tensor import (
    BlockCodes,
    Bounds,
    Float32,
    LazyTensor,
    file_fingerprint,
)
from llama_onnx.exporter.graph.names import HEAD, belongs_to, matrix_names
from llama_onnx.exporter.model.checkpoint import TensorsByName, check_tensors, find_licences
from llama_onnx.exporter.model.config import LlamaConfig, config_from_huggingface
from llama_onnx.targets.contents import check_graph_of
from llama_onnx.targets.errors import CheckpointError, PackageError
from llama_onnx.targets.folder_files import file_inside, open_inside, read_inside
from llama_onnx.targets.graph_names import LOGITS
from llama_onnx.targets.package import MANIFEST, MODEL_FILE
from llama_onnx.targets.strict_json import MAX_BYTES

PRECISIONS = ("int2", "int4", "int8", "bf16", "fp16", "fp32")
"""From the coarsest to the finest."""

# Matrices that the graph multiplies by at once: the rows of one follow those of the previous.
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}

_FLOAT_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_PRECISION_OF = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}

_HALF = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class PackageCheckpoint(TensorsByName):
    """A package folder; `tensors` maps Hugging Face names to dequantized, lazy rows.

    `config.tie_word_embeddings` is False if the graph has separate initializers for the head, even
    over the same bytes, so that the weights read by each operator are compared.
    """

    path: Path
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    activations: str = "fp32"
    """Their type if it is "fp16" or "bf16", else the type they are rounded to before a quantized
    matrix: "fp32" (no rounding) or "int8"."""
    ragged: bool = True
    """Whether each row of a batch has its valid positions first and a cache of its length, in a
    buffer that past and present can share (GroupQueryAttention). Otherwise padding keeps its
    position and takes up space in the cache."""
    keeps_codes: bool = True
    """Whether it may contain codes of a quantized source unchanged; False if its manifest records
    none."""
    format: str = "package"

    @classmethod
    def open(cls, path: Path) -> PackageCheckpoint:
        """Read config.json and model.onnx, but not the weights.

        Raises `PackageError` for a file that is missing or damaged, or for weights that do not
        match the config; `UnsupportedError` for a quantization that cannot be read back.
        """
        if not (path / MODEL_FILE).is_file():
            raise PackageError(f"{path} has no {MODEL_FILE}: pass the folder of a package.")
        config = config_from_huggingface(read_json(path / "config.json"), str(path / "config.json"))
        check_graph_of(path)  # onnx's own reader would open whatever files a graph names
        graph = load_model(path).graph
        stored = {i.name: read_initializer(path, i) for i in graph.initializer}
        made_by = {output: node for node in graph.node for output in node.output}
        blocks = {
            found.codes.name: found
            for found in (coded_rows(node, stored, made_by, path) for node in graph.node)
            if found
        }
        has_head = any(belongs_to(HEAD, name) for name in stored)
        config = replace(config, tie_word_embeddings=not has_head)
        tensors = {
            name: _tensor(name, config, stored, blocks, path) for name in config.tensor_shapes()
        }
        ragged = any(node.op_type == "GroupQueryAttention" for node in graph.node)
        checkpoint = cls(path, config, tensors, _activations(graph), ragged, _keeps_codes(path))
        check_tensors(checkpoint)
        return checkpoint

    @property
    def precision(self) -> str:
        """The coarsest precision of the package's matrices, one of `PRECISIONS`."""
        matrices = [tensor for tensor in self.tensors.values() if len(tensor.shape) == 2]
        return min(map(_precision_of, matrices), key=PRECISIONS.index)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy the tokenizer's files to `folder`; returns their names."""
        names = [name for name in _TOKENIZER_FILES if file_inside(self.path, name)]
        if "tokenizer.json" not in names:
            raise CheckpointError(f"{self.path} has no tokenizer.json: export the package again.")
        for name in names:
            content = read_inside(self.path, name, max_bytes=MAX_BYTES)
            (folder / name).write_bytes(content)
        return names

    def licence_files(self) -> Sequence[Path]:
        """Return license, policy, notice and model card in the package."""
        return find_licences(self.path)

    def search_defaults(self) -> dict[str, Any]:
        """Return {}: a package has them in genai_config.json, in genai's format."""
        return {}

    def fingerprint(self) -> dict[str, str]:
        """Return size and modification time of config, graph and data."""
        files = [self.path / "config.json", *self.path.glob(f"{MODEL_FILE}*")]
        return file_fingerprint(files)


def _keeps_codes(path: Path) -> bool:
    manifest = path / MANIFEST
    if not manifest.is_file():
        return True
    return bool(read_json(manifest).get("recipe", {}).get("taken_over"))


def _precision_of(tensor: LazyTensor) -> str:
    return f"int{tensor.codes.bits}" if tensor.codes else _PRECISION_OF[tensor.dtype]


def load_model(package: Path) -> onnx.ModelProto:
    """Return the graph of `package` without its external data; raises `PackageError` if it is
    missing or damaged."""
    path = package / MODEL_FILE
    try:
        if file_inside(package, MODEL_FILE, PackageError) is None:
            raise PackageError(f"{package} has no {MODEL_FILE}: pass the folder of a package.")
        with open_inside(package, MODEL_FILE, PackageError) as file:
            return onnx.load(file, load_external_data=False)
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror or error}.") from None
    except DecodeError:
        raise PackageError(f"{path} is not an ONNX model: export the package again.") from None


def _activations(graph: onnx.GraphProto) -> str:
    """Return the type of the logits if it is a half precision, else the type that MatMulNBits'
    accuracy_level allows: int8 for 4, half precision for 2 and 3, fp32 for 1. ONNX Runtime fuses a
    DequantizeLinear before a MatMul into a MatMulNBits of level 4."""
    logits = next(value for value in graph.output if value.name == LOGITS)
    half = _HALF.get(logits.type.tensor_type.elem_type)
    if half is not None:
        return half
    multiplied = {name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    if any(n.op_type == "DequantizeLinear" and n.output[0] in multiplied for n in graph.node):
        return "int8"
    levels = (a.i for n in graph.node for a in n.attribute if a.name == "accuracy_level")
    return {4: "int8", 3: "bf16", 2: "fp16"}.get(max(levels, default=1), "fp32")


def _tensor(
    name: str,
    config: LlamaConfig,
    stored: dict[str, Initializer],
    blocks: dict[str, CodedRows],
    path: Path,
) -> LazyTensor:
    """Return tensor `name`: a whole matrix of the graph, or rows of a fused one."""
    shapes = config.tensor_shapes()
    for module, parts in modules_holding(name.removesuffix(".weight")):
        rows = [shapes[f"{part}.weight"][0] for part in parts]
        first = sum(rows[: parts.index(name.removesuffix(".weight"))])
        floats, codes = matrix_names(module)
        if codes in blocks:
            return _quantized(name, shapes[name], blocks[codes], first, sum(rows))
        if floats in stored:
            return _float(name, shapes[name], stored[floats], first, sum(rows))
    raise PackageError(f"{path}: the graph has no weights for {name}: export the package again.")


def modules_holding(module: str) -> Iterable[tuple[str, list[str]]]:
    """Yield the modules of the graph that may contain `module`, each with its parts in order."""
    yield module, [module]
    for fused, parts in _FUSED.items():
        for part in parts:
            if module.endswith(f".{part}"):
                prefix = module.removesuffix(part)
                yield prefix + fused, [prefix + p for p in parts]


def _float(
    name: str, shape: tuple[int, ...], matrix: Initializer, first: int, total: int
) -> LazyTensor:
    code = _FLOAT_CODES.get(matrix.dtype.name)
    if code is None or matrix.shape != (total, *shape[1:]):
        raise PackageError(
            f"{matrix.file.parent}: {matrix.name} is {matrix.dtype.name} {list(matrix.shape)}, "
            f"not a float tensor of shape {[total, *shape[1:]]}: export the package again."
        )

    def rows(start: int, stop: int) -> Float32:
        return matrix.rows(first + start, first + stop).astype(np.float32)

    return LazyTensor(name, shape, code, matrix.nbytes * shape[0] // total, rows)


def _quantized(
    name: str, shape: tuple[int, ...], matrix: CodedRows, first: int, total: int
) -> LazyTensor:
    if not matrix.fits(total, shape[1]):
        raise PackageError(
            f"{matrix.codes.file.parent}: {matrix.codes.name} {list(matrix.codes.shape)} and its "
            f"scales are not a {total} x {shape[1]} matrix of {matrix.bits} bits in blocks of "
            f"{matrix.block_size}: export the package again."
        )

    def rows(start: int, stop: int) -> Float32:
        return matrix.rows(first + start, first + stop, shape[1])

    def bounds(start: int, stop: int) -> Bounds | None:
        return matrix.bounds(first + start, first + stop)

    nbytes, codes = matrix.nbytes * shape[0] // total, BlockCodes(matrix.bits, matrix.block_size)
    dtype = f"INT{codes.bits}/{codes.block_size}"
    return LazyTensor(name, shape, dtype, nbytes, rows, codes, bounds=bounds)
