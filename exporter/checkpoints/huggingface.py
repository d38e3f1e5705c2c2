"""Hugging Face folders: config.json, weights as safetensors or pytorch_model.bin (single or
sharded), tokenizer.json or tokenizer.model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.formats.state_dict import read_state_dict
from llama_onnx.exporter.formats.tensor import LazyTensor, file_fingerprint
from llama_onnx.exporter.model.checkpoint import TensorsByName, find_licences
from llama_onnx.exporter.model.config import LlamaConfig, config_from_huggingface
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside, is_plain_name, read_inside
from llama_onnx.targets.strict_json import MAX_BYTES

SINGLES = ("model.safetensors", "pytorch_model.bin")
"""Names of an unsharded weight file, the preferred format first. A sharded model has an index
instead, with `.index.json` appended to the name."""

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
    """A folder as `save_pretrained` writes it. `tensors` has lazy tensors by name."""

    path: Path
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    shards: tuple[Path, ...]
    generation: dict[str, Any]
    format: str = "huggingface"

    @classmethod
    def open(cls, path: Path) -> HuggingFaceCheckpoint:
        """Read the config and the weight files' headers in the folder `path`.

        Raises `CheckpointError` for a file that is missing or damaged, `UnsupportedError` for a
        feature that a plain Llama does not have.
        """
        generation_file = path / "generation_config.json"
        generation = read_json(generation_file) if generation_file.exists() else {}
        raw = read_json(path / "config.json")
        config = config_from_huggingface(raw, str(path / "config.json"), generation)
        shards = find_shards(path)
        tensors: dict[str, LazyTensor] = {}
        for shard in shards:
            for name, tensor in read_state_dict(shard).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: the tensor {name} is in two shards: remove one of them."
                    )
                tensors[name] = tensor
        return cls(path, config, tensors, shards, generation)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy tokenizer.json, its settings and the chat template, or make them from
        tokenizer.model; returns the file names."""
        if not (self.path / "tokenizer.json").exists():
            return self._convert_tokenizer(folder)
        return copy_tokenizer(self.path, folder)

    def _convert_tokenizer(self, folder: Path) -> list[str]:
        if not (self.path / "tokenizer.model").exists():
            raise CheckpointError(
                f"{self.path} has neither a tokenizer.json nor a tokenizer.model: copy the one the "
                "model was trained with into this folder."
            )
        from llama_onnx.exporter.tokenizer.huggingface import tokenizer_from_folder

        tokenizer = tokenizer_from_folder(self.path)
        return tokenizer.write(folder, self.config.max_position_embeddings)

    def licence_files(self) -> Sequence[Path]:
        """Return license, policy, notice and model card in the folder."""
        return find_licences(self.path)

    def search_defaults(self) -> dict[str, Any]:
        """Return the sampling defaults in generation_config.json."""
        values = {key: self.generation.get(key) for key in _SEARCH_KEYS}
        return {key: value for key, value in values.items() if value is not None}

    def fingerprint(self) -> dict[str, str]:
        """Return size and modification time of config and shards."""
        return file_fingerprint([self.path / "config.json", *self.shards])


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer in `source` and its chat template to `folder`; returns the file names."""
    from llama_onnx.exporter.tokenizer.digits import spell_out_digits
    from llama_onnx.exporter.tokenizer.huggingface import read_chat_template

    written = [name for name in _TOKENIZER_FILES if file_inside(source, name)]
    for name in written:
        content = read_inside(source, name, max_bytes=MAX_BYTES)
        (folder / name).write_bytes(content)
    original = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(spell_out_digits(original))
    template = read_chat_template(source)
    if template is not None:  # also as a file, where current readers look for it
        (folder / "chat_template.jinja").write_bytes(template.encode("utf-8", "replace"))
        written.append("chat_template.jinja")
    return written


def find_shards(path: Path) -> tuple[Path, ...]:
    """Return the weight files of the folder `path`; raises `CheckpointError` if any is missing."""
    for single in SINGLES:
        if (path / f"{single}.index.json").exists():
            return _indexed_shards(path / f"{single}.index.json")
        if found := file_inside(path, single):
            return (found,)
        stem, _, suffix = single.partition(".")
        if list(path.glob(f"{stem}*.{suffix}")):
            raise CheckpointError(
                f"{path} has {suffix} shards but no {single}.index.json: download it too."
            )
    own_name = list(path.glob("gptq_model-*.safetensors"))  # AutoGPTQ's name
    if len(own_name) == 1 and (found := file_inside(path, own_name[0].name)):
        return (found,)
    raise CheckpointError(
        f"{path} has a config.json but no {' or '.join(SINGLES)}: download the weights."
    )


def indexed_names(index: Path) -> list[str]:
    """Return the names of the shards listed in the file `index`; raises `CheckpointError` if it
    lists none."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    names = set(map(str, weight_map.values()))
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index} names the shard {name[:200]!r}, which is not a plain name inside its "
                "folder: download it again."
            )
    return sorted(names)


def _indexed_shards(index: Path) -> tuple[Path, ...]:
    names = indexed_names(index)
    found = {name: file_inside(index.parent, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(missing)} ({len(missing)} of {len(names)} shards "
            f"named in {index.name}): download the rest."
        )
    return tuple(path for path in found.values() if path)
