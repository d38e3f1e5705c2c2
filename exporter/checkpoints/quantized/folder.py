"""Hugging Face folders whose linear layers are stored as codes; those of GPTQ and AWQ."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Protocol

from llama_onnx.exporter.checkpoints.huggingface import HuggingFaceCheckpoint
from llama_onnx.exporter.checkpoints.quantized.awq import open_awq
from llama_onnx.exporter.checkpoints.quantized.gptq import open_gptq
from llama_onnx.exporter.checkpoints.quantized.packed import PackedMatrix
from llama_onnx.exporter.checkpoints.quantized.settings import Quantization
from llama_onnx.exporter.checkpoints.quantized.transposed import Parts
from llama_onnx.exporter.checkpoints.state import in_model
from llama_onnx.exporter.formats.safetensors import stored_tensors
from llama_onnx.exporter.formats.tensor import LazyTensor, StoredTensor
from llama_onnx.exporter.model.checkpoint import CodedMatrix
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.target import FloatName

_OPEN = {"gptq": open_gptq, "awq": open_awq}
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


class Description(Protocol):
    """What is known of a checkpoint's codes without reading them."""

    @property
    def bits(self) -> int:
        """Bits per code in most matrices."""
        ...

    def describe(self) -> str:
        """Return method, bits and groups, for display."""
        ...


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint(HuggingFaceCheckpoint):
    """A folder with quantized linear layers. `packed` has their matrices by name, `tensors` the
    other tensors, which are stored as floats."""

    quantization: Description
    packed: dict[str, PackedMatrix]
    reads_whole: bool = True

    @property
    def native_bits(self) -> int:
        """Bits per code in most matrices."""
        return self.quantization.bits

    def describe(self) -> str:
        """Return method, bits, groups and layout, for display."""
        return self.quantization.describe()

    def names(self) -> Iterable[str]:
        """Return the names of all tensors; a quantized matrix has the name of its floats."""
        return [*self.tensors, *self.packed]

    def tensor(self, name: str) -> LazyTensor:
        """Return tensor `name`, dequantized if it is quantized."""
        return self.packed[name].tensor() if name in self.packed else super().tensor(name)

    def bits_of(self, name: str) -> int | None:
        """Return the bits per code of tensor `name`; None if it is stored as floats."""
        return self.packed[name].bits if name in self.packed else None

    def obstacle(self, name: str, scales: FloatName) -> str | None:
        """Return None: a package can keep all codes."""
        return None

    def coded(self, name: str) -> CodedMatrix:
        """Return matrix `name` as codes."""
        return self.packed[name].coded()


def open_quantized(plain: HuggingFaceCheckpoint, quantization: Quantization) -> QuantizedCheckpoint:
    """Return the quantized checkpoint in the folder of `plain`, in which codes are integer tensors.
    Reads headers only.

    Raises `CheckpointError` for a module whose tensors contradict one another or the
    configuration, `UnsupportedError` for weights that are not safetensors or a quantized embedding
    or tied head.
    """
    stored = stored_in_model(plain)
    modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    if not modules:
        raise CheckpointError(
            f"{quantization.where} specifies {quantization.method.upper()}, but no tensor in "
            f"{plain.path} is quantized: config and weights belong to different models."
        )
    packed = {f"{module}.weight": _open(module, stored, quantization) for module in modules}
    check_names(plain, packed, plain.tensors)
    taken = {f"{module}.{part}" for module in modules for part in _PARTS}
    rest = {name: tensor for name, tensor in plain.tensors.items() if name not in taken}
    return QuantizedCheckpoint(
        plain.path,
        plain.config,
        rest,
        plain.shards,
        plain.generation,
        plain.notes,
        quantization=quantization,
        packed=packed,
    )


def stored_in_model(plain: HuggingFaceCheckpoint) -> dict[str, StoredTensor]:
    """Return the tensors in the files of `plain` by their names in the model; raises
    `UnsupportedError` unless the files are safetensors."""
    if any(shard.suffix != ".safetensors" for shard in plain.shards):
        raise UnsupportedError(
            f"{plain.path} holds quantized weights in {plain.shards[0].name}, which can be read "
            "from safetensors only: load the model and save it again with save_pretrained."
        )
    stored: dict[str, StoredTensor] = {}
    for shard in plain.shards:
        found = stored_tensors(shard)
        stored |= {in_model(name): tensor for name, tensor in found.items()}
    return stored


def _open(module: str, stored: dict[str, StoredTensor], quantization: Quantization) -> PackedMatrix:
    found = [stored.get(f"{module}.{part}") for part in _PARTS]
    qweight, qzeros, scales, g_idx, bias = found
    if qweight is None or qzeros is None or scales is None:
        missing = next(part for part, tensor in zip(_PARTS, found, strict=True) if tensor is None)
        raise CheckpointError(
            f"{stored[f'{module}.qweight'].path} has {module}.qweight, but no {module}.{missing}: "
            "a file is missing, or the weights are damaged."
        )
    return _OPEN[quantization.method](
        Parts(module, qweight, qzeros, scales, g_idx, bias), quantization
    )


def check_names(
    plain: HuggingFaceCheckpoint, packed: dict[str, PackedMatrix], floats: Container[str]
) -> None:
    """Refuse matrices that are stored twice, in `packed` and as `floats`, and quantized embeddings
    and tied heads."""
    for name in packed:
        if name in floats:
            raise CheckpointError(
                f"{plain.path} has {name} as floats and as codes: remove one of them."
            )
    tied = plain.config.tie_word_embeddings and "lm_head.weight" in packed
    if tied or "model.embed_tokens.weight" in packed:
        what = "a head tied to the embedding" if tied else "the embedding"
        raise UnsupportedError(
            f"{plain.path} has {what} quantized, which is not supported: export the original "
            "weights."
        )
