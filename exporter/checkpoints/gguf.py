"""GGUF files: one file with config, tokenizer and (mostly quantized) weights of a Llama.

llama.cpp's converter reorders the rows of q and k in each head, from Hugging Face's half-split
rotary embedding to the interleaved one; here they are read in Hugging Face's order. Codes lie along
rows, so they can be reordered and kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from llama_onnx.exporter.checkpoints.gguf_codes import CODINGS, WITH_MINIMA, BlockMatrix, Bytes
from llama_onnx.exporter.checkpoints.gguf_rope import FREQUENCIES, rope_block
from llama_onnx.exporter.formats.gguf import Header, TensorInfo, read_header
from llama_onnx.exporter.formats.tensor import (
    BlockCodes,
    Float32,
    LazyTensor,
    file_fingerprint,
    read_values,
)
from llama_onnx.exporter.model.checkpoint import CodedMatrix, TensorsByName, find_licences
from llama_onnx.exporter.model.config import (
    MAX_EPSILON,
    MAX_LAYERS,
    MIN_EPSILON,
    LlamaConfig,
    check_config,
    rope_scaling,
)
from llama_onnx.exporter.model.context import with_context
from llama_onnx.exporter.model.interleaved import half_split_rows
from llama_onnx.exporter.model.special_tokens import SpecialTokens, special_tokens
from llama_onnx.exporter.model.typed_keys import MAX_NUMBER, MAX_SIZE, Keys, is_number
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import shown
from llama_onnx.targets.target import FloatName

_TYPES = (
    Type.F32,
    Type.F16,
    Type.BF16,
    Type.Q4_0,
    Type.Q4_1,
    Type.Q5_0,
    Type.Q5_1,
    Type.Q8_0,
    Type.Q4_K,
    Type.Q5_K,
    Type.Q6_K,
)
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Part of the name of a tensor in a layer -> Hugging Face's."""


@dataclass(frozen=True)
class GGUFCheckpoint(TensorsByName):
    """One GGUF file. `tensors` maps Hugging Face names to lazy tensors in it; `notes` are warnings
    for people."""

    path: Path
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...] = ()
    format: str = "gguf"

    @classmethod
    def open(cls, path: Path, context: int | None = None) -> GGUFCheckpoint:
        """Read the header of the file `path`. `context` replaces the one that it states.

        Raises `CheckpointError` for a damaged file, `UnsupportedError` for a model or a storage
        type that is not supported.
        """
        header = read_header(path)
        where = str(path)
        _refuse_features(header, where)
        config = _config(path, header)
        stored = [info for name, info in header.tensors.items() if name != FREQUENCIES]
        tensors = (_lazy(path, info, config) for info in stored)
        left_out = _special_tokens(_Keys(header.metadata, where), config.vocab_size, where).warnings
        config, stretched = with_context(config, context, where)
        named = {tensor.name: tensor for tensor in tensors}
        notes = (*left_out, *stretched)
        blocks = {m.name: m for info in stored if (m := _block_matrix(path, info, config))}
        if blocks:
            return QuantizedGGUF(path, config, named, notes, blocks=blocks)
        return cls(path, config, named, notes)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write the tokenizer's files, made from the metadata."""
        # Read again, not kept: 128,000 strings take much memory and are needed only once.
        from llama_onnx.exporter.tokenizer.gguf import tokenizer_from_gguf

        metadata = read_header(self.path).metadata
        tokenizer = tokenizer_from_gguf(metadata, str(self.path))
        return tokenizer.write(folder, self.config.max_position_embeddings)

    def warnings(self) -> Sequence[str]:
        """Return which special tokens are left out, and whether the context is too long."""
        return self.notes

    def licence_files(self) -> Sequence[Path]:
        """Return license, policy, notice and model card in the file's folder."""
        return find_licences(self.path.parent)

    def search_defaults(self) -> dict[str, Any]:
        """Return {}: GGUF has no sampling defaults."""
        return {}

    def fingerprint(self) -> dict[str, str]:
        """Return size and modification time of the file."""
        return file_fingerprint([self.path])


@dataclass(frozen=True, kw_only=True)
class QuantizedGGUF(GGUFCheckpoint):
    """A GGUF file with matrices in blocks of codes: those in `blocks`, by name."""

    blocks: dict[str, BlockMatrix]
    reads_whole: bool = False

    @property
    def native_bits(self) -> int | None:
        """4 if most values in the decoder's matrices have codes of 4 bits, 8 if they have more;
        None if they are floats."""
        sizes: Counter[int | None] = Counter()
        for name, tensor in self.tensors.items():
            if len(tensor.shape) == 2 and name.startswith("model.layers."):
                sizes[self._package_bits(name)] += prod(tensor.shape)
        return max(sizes, key=sizes.__getitem__, default=None)

    def _package_bits(self, name: str) -> int | None:
        bits = self.bits_of(name)
        return None if bits is None else 4 if bits <= 4 else 8

    def describe(self) -> str:
        """Return how many matrices are stored as each type, for display."""
        counts = Counter(matrix.type.name for matrix in self.blocks.values())
        return "GGUF with " + ", ".join(f"{count} {name}" for name, count in counts.most_common())

    def bits_of(self, name: str) -> int | None:
        """Return the bits per code of tensor `name`; None if it is stored as floats."""
        return self.blocks[name].bits if name in self.blocks else None

    def obstacle(self, name: str, scales: FloatName) -> str | None:
        """Return why a package with `scales` cannot keep the codes of matrix `name`; None if it
        can."""
        return self.blocks[name].obstacle(scales)

    def coded(self, name: str) -> CodedMatrix:
        """Return matrix `name` as codes; it has no obstacle."""
        return self.blocks[name].coded()


def _refuse_features(header: Header, where: str) -> None:
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(
            f"{where}: general.architecture is {shown(architecture)}; this tool exports the Llama "
            "architecture only."
        )
    if metadata.get("split.count", 0) not in (0, 1):  # 0 after the parts were joined
        raise UnsupportedError(
            f"{where} is one of {shown(metadata['split.count'])} parts of a split model: join them "
            "with llama.cpp's `llama-gguf-split --merge` first."
        )
    if metadata.get("llama.expert_count", 0):
        raise UnsupportedError(f"{where} is a mixture of experts, which is not supported.")
    for name, tensor in header.tensors.items():
        if name.endswith(".bias"):
            raise UnsupportedError(f"{where} has {name}; biases are not supported.")
        if tensor.type not in _TYPES:
            raise UnsupportedError(
                f"{where}: {name} is stored as {tensor.type.name}, which is not supported: use a "
                "file with F32, F16, BF16, Q4_0 to Q8_0 or Q4_K to Q6_K."
            )


def _config(path: Path, header: Header) -> LlamaConfig:
    where = str(path)
    keys = _Keys(header.metadata, where)
    heads = keys.integer("llama.attention.head_count")
    hidden = keys.integer("llama.embedding_length")
    head_dim = _head_dim(keys, hidden, heads, where)
    context = keys.integer("llama.context_length", most=1 << 62)
    theta = keys.number("llama.rope.freq_base", default=10000.0)
    vocabulary = keys.integer("llama.vocab_size", default=_embedding_rows(header, where))
    tokens = _special_tokens(keys, vocabulary, where)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=keys.integer("llama.feed_forward_length"),
        num_hidden_layers=keys.integer("llama.block_count", most=MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=keys.integer("llama.attention.head_count_kv", default=heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=keys.number(
            "llama.attention.layer_norm_rms_epsilon", None, MIN_EPSILON, MAX_EPSILON
        ),
        rope_theta=theta,
        tie_word_embeddings="output.weight" not in header.tensors,
        bos_token_id=tokens.bos,
        eos_token_ids=tokens.eos,
        pad_token_id=tokens.pad,
        rope_scaling=rope_scaling(rope_block(path, header, theta, head_dim), context, where),
    )
    # Checked first: a damaged file may claim millions of layers.
    if config.num_hidden_layers > len(header.tensors):
        raise CheckpointError(
            f"{where}: llama.block_count is {config.num_hidden_layers:,}, but the file has "
            f"{len(header.tensors):,} tensors."
        )
    check_config(config, where)
    return config


def _embedding_rows(header: Header, where: str) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{where} lacks the tensor token_embd.weight.")
    return embedding.shape[0]


def _head_dim(keys: _Keys, hidden: int, heads: int, where: str) -> int:
    if hidden % heads and not keys.has("llama.attention.key_length"):
        raise CheckpointError(
            f"{where}: llama.embedding_length {hidden} is not a multiple of "
            f"llama.attention.head_count {heads}, and there is no llama.attention.key_length."
        )
    head_dim = keys.integer("llama.attention.key_length", default=hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if keys.integer(key, default=head_dim) != head_dim:
            raise UnsupportedError(
                f"{where}: {key} differs from the head size {head_dim}, which is not supported."
            )
    return head_dim


def _special_tokens(keys: _Keys, vocabulary: int, where: str) -> SpecialTokens:
    # A chat model ends a turn with eot and a tool call with eom: generation has to stop at both.
    bos, pad, *ends = (keys.token_ids(name) for name in ("bos", "padding", "eos", "eot", "eom"))
    eos = tuple(dict.fromkeys(token for found in ends for token in found))
    return special_tokens(bos, eos, pad, vocabulary, where)


def _lazy(path: Path, info: TensorInfo, config: LlamaConfig) -> LazyTensor:
    stored = _rows_in_order(path, info, config)

    def rows(start: int, stop: int) -> Float32:
        values: Float32 = dequantize(stored(start, stop), info.type)
        return values.reshape(stop - start, *info.shape[1:])

    name, coding = huggingface_name(info.name), CODINGS.get(info.type)
    codes = BlockCodes(coding.bits, coding.block_size) if coding else None
    return LazyTensor(name, info.shape, info.type.name, info.nbytes, rows, codes)


def _block_matrix(path: Path, info: TensorInfo, config: LlamaConfig) -> BlockMatrix | None:
    """Return the tensor as a matrix in blocks of codes; None if it is not one."""
    if len(info.shape) != 2 or info.type not in (*CODINGS, *WITH_MINIMA):
        return None
    rows = _rows_in_order(path, info, config)
    return BlockMatrix(huggingface_name(info.name), info.shape, info.type, rows)


def _rows_in_order(
    path: Path, info: TensorInfo, config: LlamaConfig
) -> Callable[[int, int], Bytes]:
    """Return a function that reads rows as bytes [R, bytes], in Hugging Face's order."""
    rows = partial(_read_rows, path, info)
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }.get(_layer_part(info.name))
    # check_tensors reports a wrong number of rows with the tensor's name.
    if heads is not None and info.shape[0] == heads * config.head_dim:
        return partial(half_split_rows, rows, config.head_dim)
    return rows


def _layer_part(name: str) -> str:
    parts = name.split(".")
    layered = len(parts) == 4 and parts[0] == "blk" and is_number(parts[1]) and parts[3] == "weight"
    return parts[2] if layered else ""


def huggingface_name(name: str) -> str:
    """Return the Hugging Face name of tensor `name`; an unknown one keeps its name.

    >>> huggingface_name("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    part = LAYER_NAMES.get(_layer_part(name))
    if part is None:
        return _NAMES.get(name, name)
    return f"model.layers.{int(name.split('.')[1])}.{part}.weight"


def _read_rows(path: Path, info: TensorInfo, start: int, stop: int) -> Bytes:
    row_bytes = info.nbytes // info.shape[0]
    count = (stop - start) * row_bytes
    offset = info.offset + start * row_bytes
    data = read_values(path, np.dtype(np.uint8), count, offset, info.name)
    return data.reshape(stop - start, row_bytes)


class _Keys(Keys):
    """Reads typed values from the metadata; every error names the file."""

    def has(self, key: str) -> bool:
        return key in self._raw

    def integer(self, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if not isinstance(value, list):
            return super().integer(key, default, most)
        if len(set(value)) != 1:
            raise UnsupportedError(f"{self._where}: {key} differs between layers.")
        # One value per layer, all equal.
        return Keys({key: value[0]}, self._where).integer(key, most=most)

    def number(
        self,
        key: str,
        default: float | None = None,
        least: float = 1 / MAX_NUMBER,
        most: float = MAX_NUMBER,
    ) -> float:
        # The shortest decimal that gives this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(super().number(key, default, least, most))))

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return the id of the token `name`, or nothing: llama.cpp writes -1 for "none"."""
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise CheckpointError(f"{self._where}: {key} must be a token id, not {shown(value)}.")
        return () if value is None or value < 0 else (value,)

    def _get(self, key: str, default: Any) -> Any:
        value = self._raw.get(key, default)
        if value is None:
            raise CheckpointError(f"{self._where} lacks the metadata key {key!r}.")
        return value
