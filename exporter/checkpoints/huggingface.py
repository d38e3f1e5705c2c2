"""Hugging Face folders: config.json, weights as safetensors or pytorch_model.bin (single or
sharded), tokenizer.json or tokenizer.model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.config_warnings import config_warnings
from llama_onnx.exporter.checkpoints.state import read_state, resolve_head
from llama_onnx.exporter.checkpoints.weight_files import find_weight_files
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.formats.tensor import LazyTensor, file_fingerprint
from llama_onnx.exporter.model.checkpoint import TensorsByName, find_licences
from llama_onnx.exporter.model.config import LlamaConfig, config_from_huggingface
from llama_onnx.exporter.model.context import with_context
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside

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
    """A folder as `save_pretrained` writes it. `tensors` has lazy tensors by name; `notes` are
    warnings for people."""

    path: Path
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    shards: tuple[Path, ...]
    generation: dict[str, Any]
    notes: tuple[str, ...] = ()
    format: str = "huggingface"

    @classmethod
    def open(cls, path: Path, context: int | None = None) -> HuggingFaceCheckpoint:
        """Read the config and the weight files' headers in the folder `path`. `context` replaces
        the config's own.

        Raises `CheckpointError` for a file that is missing or damaged, `UnsupportedError` for a
        feature that a plain Llama does not have.
        """
        name = "generation_config.json"
        generation = read_json(path / name) if file_inside(path, name) else {}
        raw = read_json(path / "config.json")
        where = str(path / "config.json")
        config = config_from_huggingface(raw, where, generation)
        weights = find_weight_files(path, raw)
        stored, differences = read_state(path, weights)
        tensors, config, head = resolve_head(path, stored, config)
        config, stretched = with_context(config, context, where)
        doubts = config_warnings(raw, config, where, generation, context_chosen=context is not None)
        notes = (*weights.warnings, *differences, *head, *doubts, *stretched)
        return cls(path, config, tensors, weights.files, generation, notes)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Copy tokenizer.json, its settings and the chat template, or make them from
        tokenizer.model; returns the file names."""
        if not file_inside(self.path, "tokenizer.json"):
            return self._convert_tokenizer(folder)
        from llama_onnx.exporter.tokenizer.json_file import copy_tokenizer

        return copy_tokenizer(self.path, folder, self.config.max_position_embeddings)

    def _convert_tokenizer(self, folder: Path) -> list[str]:
        if not file_inside(self.path, "tokenizer.model"):
            raise CheckpointError(
                f"{self.path} has neither a tokenizer.json nor a tokenizer.model: copy the one the "
                "model was trained with into this folder."
            )
        from llama_onnx.exporter.tokenizer.huggingface import tokenizer_from_folder

        tokenizer = tokenizer_from_folder(self.path)
        return tokenizer.write(folder, self.config.max_position_embeddings)

    def warnings(self) -> Sequence[str]:
        """Return what is left out or read in another way than the files say."""
        return self.notes

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
