"""Meta's download: params.json, consolidated.NN.pth (one shard per GPU), tokenizer.model.

Meta splits every matrix along the axis of its model-parallel layer, so that every shard holds a
piece of each; the pieces are joined again as rows are read. In queries and keys, the rows of a head
are interleaved for the rotary embedding; `rows()` returns them in Hugging Face's order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llama_onnx.exporter.checkpoints.hub import source_name
from llama_onnx.exporter.checkpoints.meta_params import ROTARY_BUFFER, config_from_params
from llama_onnx.exporter.formats.json import read_json
from llama_onnx.exporter.formats.tensor import Float32, LazyTensor, file_fingerprint
from llama_onnx.exporter.formats.torch_file import read_torch_file
from llama_onnx.exporter.model.checkpoint import TensorsByName, find_licences
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.exporter.model.context import with_context
from llama_onnx.exporter.model.interleaved import half_split_rows
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.licences import TERMS, kind_of

_ROWS, _COLUMNS, _COPIES = "rows", "columns", "copies"
_MODEL_PARTS = {
    "tok_embeddings": ("model.embed_tokens", _COLUMNS),
    "norm": ("model.norm", _COPIES),
    "output": ("lm_head", _ROWS),
}
_LAYER_PARTS = {
    "attention.wq": ("self_attn.q_proj", _ROWS),
    "attention.wk": ("self_attn.k_proj", _ROWS),
    "attention.wv": ("self_attn.v_proj", _ROWS),
    "attention.wo": ("self_attn.o_proj", _COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", _ROWS),
    "feed_forward.w2": ("mlp.down_proj", _COLUMNS),
    "feed_forward.w3": ("mlp.up_proj", _ROWS),
    "attention_norm": ("input_layernorm", _COPIES),
    "ffn_norm": ("post_attention_layernorm", _COPIES),
}
"""Meta's name -> Hugging Face's name, and which part of the tensor each shard holds."""

_LAYER = re.compile(r"layers\.([0-9]{1,6})\.(.+)\.weight")
_SHARD = re.compile(r"consolidated\.([0-9]{1,4})\.pth")

Shard = dict[str, LazyTensor]


@dataclass(frozen=True)
class MetaCheckpoint(TensorsByName):
    """A folder as Meta distributes it. `tensors` maps Hugging Face names to the joined tensors."""

    path: Path
    config: LlamaConfig
    tensors: dict[str, LazyTensor]
    shards: tuple[Path, ...]
    tokenizer: Path
    notes: tuple[str, ...] = ()
    format: str = "meta"

    @classmethod
    def open(cls, path: Path, context: int | None = None) -> MetaCheckpoint:
        """Read params.json and the headers of the shards and the tokenizer. `context` replaces the
        one that follows from them.

        Raises `CheckpointError` for a file that is missing, damaged or of another model.
        """
        from llama_onnx.exporter.tokenizer.model_file import read_facts

        params = path / "params.json"
        raw = read_json(params)
        tokenizer = _find_tokenizer(path)
        files = _find_shards(path)
        shards = {number: read_torch_file(file) for number, file in files.items()}
        _require_all(path, shards)
        joined = _join_all(path, list(shards.values()))
        shapes = {name: tensor.shape for name, tensor in joined.items()}
        facts = read_facts(tokenizer)
        config = config_from_params(raw, str(params), source_name(path), shapes, facts)
        tensors = {
            name: _half_split(tensor, config)
            for name, tensor in joined.items()
            if not name.endswith(ROTARY_BUFFER)
        }
        config, notes = with_context(config, context, str(params))
        return cls(path, config, tensors, tuple(files.values()), tokenizer, notes)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write the tokenizer's files, made from tokenizer.model.

        A chat model, recognized by `chat` in the folder's name as Meta distributes it, gets Llama
        2's prompt format.
        """
        from llama_onnx.exporter.tokenizer.llama2 import LLAMA2_CHAT_TEMPLATE
        from llama_onnx.exporter.tokenizer.model_file import tokenizer_from_model_file

        tokenizer = tokenizer_from_model_file(self.tokenizer)
        if "chat" in source_name(self.path).lower():
            tokenizer = replace(tokenizer, chat_template=LLAMA2_CHAT_TEMPLATE)
        return tokenizer.write(folder, self.config.max_position_embeddings)

    def warnings(self) -> Sequence[str]:
        """Return whether the context is longer than the model's."""
        return self.notes

    def licence_files(self) -> Sequence[Path]:
        """Return license, policy, notice and model card, which may be in the parent folder."""
        own = find_licences(self.path)
        names = {file.name for file in own}
        above = find_licences(self.path.resolve().parent)
        # A README.md in the parent folder may be about something else.
        terms = [file for file in above if kind_of(file.name) in TERMS]
        return [*own, *(file for file in terms if file.name not in names)]

    def search_defaults(self) -> dict[str, Any]:
        """Return {}: Meta's download has no sampling defaults."""
        return {}

    def fingerprint(self) -> dict[str, str]:
        """Return size and modification time of params.json, shards and tokenizer."""
        return file_fingerprint([self.path / "params.json", *self.shards, self.tokenizer])


def _find_tokenizer(path: Path) -> Path:
    # A download of several models has one tokenizer, in the parent folder.
    places = (path, path.resolve().parent)
    for place in places:
        if found := file_inside(place, "tokenizer.model"):
            return found
    raise CheckpointError(
        f"neither {path} nor its parent folder has a tokenizer.model: copy it next to params.json."
    )


def _find_shards(path: Path) -> dict[int, Path]:
    matches = ((_SHARD.fullmatch(file.name), file) for file in path.glob("consolidated.*.pth"))
    named = {int(match[1]): file.name for match, file in matches if match}
    inside = {number: file_inside(path, name) for number, name in named.items()}
    found = {number: file for number, file in inside.items() if file}
    if not found:
        raise CheckpointError(f"{path} has a params.json but no consolidated.00.pth: download it.")
    return dict(sorted(found.items()))


def _require_all(path: Path, shards: dict[int, Shard]) -> None:
    """Raise `CheckpointError` unless all shards are there. Their number follows from any shard,
    which has its share of the embedding's columns and a whole norm."""
    for number, shard in shards.items():
        try:
            dim, width = shard["norm.weight"].shape[-1], shard["tok_embeddings.weight"].shape[-1]
        except (KeyError, IndexError):
            raise CheckpointError(
                f"{path}: shard {number} has no embedding or no norm: it is not a shard of a Llama."
            ) from None
        count = max(1, dim // max(1, width))
        missing = [f"consolidated.{n:02}.pth" for n in range(count) if n not in shards]
        if missing:
            raise CheckpointError(
                f"{path} lacks {', '.join(missing)} ({len(missing)} of {count} shards): download "
                "the rest."
            )
        if len(shards) > count:
            raise CheckpointError(
                f"{path} has {len(shards)} shards, but shard {number} is one of {count}: they are "
                "from different models."
            )


def _join_all(path: Path, shards: Sequence[Shard]) -> dict[str, LazyTensor]:
    for number, shard in enumerate(shards):
        odd = shards[0].keys() ^ shard.keys()
        if odd:
            raise CheckpointError(
                f"{path}: {min(odd)} is not in both shard 0 and shard {number}: they are from "
                "different models."
            )
    joined = (_join(path, name, [shard[name] for shard in shards]) for name in shards[0])
    return {tensor.name: tensor for tensor in joined}


def _join(path: Path, meta_name: str, parts: Sequence[LazyTensor]) -> LazyTensor:
    name, held = _translate(meta_name)
    first = parts[0]
    for number, part in enumerate(parts):
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{path}: {meta_name} is {first.dtype} {list(first.shape)} in shard 0, but "
                f"{part.dtype} {list(part.shape)} in shard {number}: they are from different "
                "models."
            )
    if len(parts) == 1:
        return replace(first, name=name)
    if held == _COPIES or len(first.shape) != 2:
        return replace(first, name=name, rows=partial(_same_rows, path, meta_name, parts))
    rows, columns = first.shape
    nbytes = sum(part.nbytes for part in parts)
    if held == _ROWS:
        shape, read = (rows * len(parts), columns), _stacked_rows
    else:
        shape, read = (rows, columns * len(parts)), _adjoined_rows
    return LazyTensor(name, shape, first.dtype, nbytes, partial(read, parts))


def _translate(name: str) -> tuple[str, str]:
    """Return the Hugging Face name and the part each shard holds; keep an unknown name, which
    `check_tensors` reports."""
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _LAYER_PARTS:
        part, held = _LAYER_PARTS[layer[2]]
        return f"model.layers.{int(layer[1])}.{part}.weight", held
    stem = name.removesuffix(".weight")
    if stem in _MODEL_PARTS:
        part, held = _MODEL_PARTS[stem]
        return f"{part}.weight", held
    return name, _COPIES


def _stacked_rows(parts: Sequence[LazyTensor], start: int, stop: int) -> Float32:
    """Return rows of the matrix whose shards are stacked."""
    height = parts[0].shape[0]
    spans = [
        (max(start - i * height, 0), min(stop - i * height, height)) for i in range(len(parts))
    ]
    pieces = [p.rows(*span) for p, span in zip(parts, spans, strict=True) if span[0] < span[1]]
    return np.concatenate(pieces) if pieces else parts[0].rows(0, 0)


def _adjoined_rows(parts: Sequence[LazyTensor], start: int, stop: int) -> Float32:
    """Return rows of the matrix whose shards are side by side."""
    return np.concatenate([part.rows(start, stop) for part in parts], axis=1)


def _same_rows(
    path: Path, name: str, parts: Sequence[LazyTensor], start: int, stop: int
) -> Float32:
    """Return rows of a tensor that every shard has a copy of; raises `CheckpointError` if the
    copies differ."""
    first = parts[0].rows(start, stop)
    for number, part in enumerate(parts):
        if not np.array_equal(first, part.rows(start, stop), equal_nan=True):
            raise CheckpointError(
                f"{path}: {name} differs between shard 0 and shard {number}: they are from "
                "different models."
            )
    return first


def _half_split(tensor: LazyTensor, config: LlamaConfig) -> LazyTensor:
    part = tensor.name.removesuffix("_proj.weight").rpartition(".")[2]
    size = {"q": config.q_size, "k": config.kv_size}.get(part)
    # check_tensors reports a wrong number of rows, with the tensor's name.
    if len(tensor.shape) != 2 or tensor.shape[0] != size:
        return tensor
    return replace(tensor, rows=partial(half_split_rows, tensor.rows, config.head_dim))
