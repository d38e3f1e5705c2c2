"""Hugging Face folders: config.json, weights as safetensors or pytorch_model.bin (single or
sharded), tokenizer.json or tokenizer.model.

The safetensors header is read here rather than through the library: `safe_open` maps the whole file
for as long as it is open and every page read stays resident, which would end the promise of
bounded memory. The format (8-byte little-endian header length, JSON header, data) is published at
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_onnx.exporter.checkpoints.quantized.settings import read_quantization
from llama_onnx.exporter.model.checkpoint import (
    LazyTensor,
    StoredTensor,
    TensorsByName,
    file_fingerprint,
    find_licences,
)
from llama_onnx.exporter.model.config import LlamaConfig, config_from_huggingface, read_json
from llama_onnx.targets.errors import CheckpointError

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),  # integers hold the codes of a quantized checkpoint
    "I64": np.dtype("<i8"),
}
_MAX_HEADER = 100_000_000  # the format's own limit
SINGLES = ("model.safetensors", "pytorch_model.bin")
"""The file of a model in one piece, the format preferred first; sharded, it has an index instead:
the same name and `.index.json`."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SEARCH_KEYS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


@dataclass(frozen=True)
class HuggingFaceCheckpoint(TensorsByName):
    """A folder as `save_pretrained` writes it. `tensors` maps each name to its place on disk."""

    path: Path
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    shards: tuple[Path, ...]
    generation: dict[str, Any]
    format: str = "huggingface"

    @classmethod
    def open(cls, path: Path) -> HuggingFaceCheckpoint:
        """Read config and headers of the folder `path`; raises `CheckpointError`."""
        generation_file = path / "generation_config.json"
        generation = read_json(generation_file) if generation_file.exists() else {}
        raw = read_json(path / "config.json")
        quantization = read_quantization(path, raw)
        config = config_from_huggingface(raw, str(path / "config.json"), generation)
        shards = find_shards(path)
        tensors: dict[str, LazyTensor] = {}
        for shard in shards:
            for name, tensor in read_weights(shard).items():
                if name in tensors:
                    raise CheckpointError(f"{path}: the tensor {name} stands in two shards.")
                tensors[name] = tensor
        plain = cls(path, config, tensors, shards, generation)
        if quantization is None:
            return plain
        from llama_onnx.exporter.checkpoints.quantized.folder import open_quantized

        return open_quantized(plain, quantization)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy tokenizer.json, its settings and the chat template, or make them from
        tokenizer.model."""
        if not (self.path / "tokenizer.json").exists():
            return self._convert_tokenizer(folder)
        return copy_tokenizer(self.path, folder)

    def _convert_tokenizer(self, folder: Path) -> list[str]:
        if not (self.path / "tokenizer.model").exists():
            raise CheckpointError(
                f"{self.path} has neither a tokenizer.json nor a tokenizer.model: put the one the "
                "model was trained with beside the weights."
            )
        from llama_onnx.exporter.tokenizer.huggingface import tokenizer_from_folder

        tokenizer = tokenizer_from_folder(self.path)
        return tokenizer.write(folder, self.config.max_position_embeddings)

    def licence_files(self) -> Sequence[Path]:
        """Licence, policy, notice and model card beside the weights."""
        return find_licences(self.path)

    def search_defaults(self) -> dict[str, Any]:
        """Sampling defaults from generation_config.json."""
        values = {key: self.generation.get(key) for key in _SEARCH_KEYS}
        return {key: value for key, value in values.items() if value is not None}

    def fingerprint(self) -> dict[str, str]:
        """Size and modification time of config and shards."""
        return file_fingerprint([self.path / "config.json", *self.shards])


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer in `source` and its chat template to `folder`; returns the file names."""
    from llama_onnx.exporter.tokenizer.digits import spell_out_digits
    from llama_onnx.exporter.tokenizer.huggingface import read_chat_template

    written = [name for name in _TOKENIZER_FILES if (source / name).exists()]
    for name in written:
        shutil.copyfile(source / name, folder / name)
    original = (source / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(spell_out_digits(original))
    template = read_chat_template(source)
    if template is not None:  # as a file too, where today's readers look for it
        (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "replace"))
        written.append("chat_template.jinja")
    return written


def read_weights(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file or of a pickled one, by its name's ending."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    from llama_onnx.exporter.formats.torch_file import read_torch_file

    return read_torch_file(path)


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Header of a safetensors file as lazy tensors; raises `CheckpointError` when damaged."""
    return {name: stored.lazy() for name, stored in stored_tensors(path).items()}


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors file lies; raises `CheckpointError` when damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} is no whole safetensors file (its header ends behind the file's end): "
                    "download it again."
                )
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("not an object")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        raise CheckpointError(
            f"{path} is no safetensors file (its header is not JSON): download it again."
        ) from None
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> StoredTensor:
    try:
        code, shape = str(entry["dtype"]), tuple(int(dim) for dim in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the header's entry for {name} is damaged.") from None
    if base + end > size:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {base + end:,}, the file at {size:,}. "
            "Download it again."
        )
    dtype = _DTYPES.get(code)
    if dtype is not None and end - begin != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise CheckpointError(f"{path}: {name} has {end - begin:,} bytes, not those of its shape.")
    return StoredTensor(path, name, shape, code, dtype, base + begin, end - begin)


def find_shards(path: Path) -> tuple[Path, ...]:
    """The weight files of the folder `path`; raises `CheckpointError` unless all are there."""
    for single in SINGLES:
        if (path / f"{single}.index.json").exists():
            return _indexed_shards(path / f"{single}.index.json")
        if (path / single).is_file():
            return (path / single,)
        stem, _, suffix = single.partition(".")
        if list(path.glob(f"{stem}*.{suffix}")):
            raise CheckpointError(
                f"{path} has {suffix} shards but no {single}.index.json: download it too."
            )
    own_name = list(path.glob("gptq_model-*.safetensors"))  # as AutoGPTQ calls it
    if len(own_name) == 1:
        return (own_name[0],)
    raise CheckpointError(f"{path} has a config.json but no {' or '.join(SINGLES)}.")


def indexed_names(index: Path) -> list[str]:
    """Names of the shards that the file `index` lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.")
    return sorted({str(name) for name in weight_map.values()})


def _indexed_shards(index: Path) -> tuple[Path, ...]:
    names = indexed_names(index)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(missing)} ({len(missing)} of {len(names)} shards "
            f"named in {index.name}): download the rest."
        )
    return tuple(index.parent / name for name in names)
