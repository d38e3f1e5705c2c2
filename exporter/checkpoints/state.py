"""The tensors of a Hugging Face folder by their names in the model: shards joined, prefixes as
transformers reads them, and the two ways of saving a tied head."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llama_onnx.exporter.checkpoints.weight_files import WeightFiles
from llama_onnx.exporter.formats.state_dict import read_state_dict
from llama_onnx.exporter.formats.tensor import LazyTensor, same_values
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.printable import printable

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_PARTS = ("layers.", "embed_tokens.", "norm.", "rotary_emb.")
"""What the names begin with, after "model."."""

_PREFIXED = re.compile(r"(.+?\.)(?:model\.)?(?:layers\.\d+\..+|embed_tokens\.weight|norm\.weight)")

_INNER = re.compile(r"(_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.)")
"""Prefixes that a wrapper around a part of the model puts inside a name."""

_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "torch's DataParallel",
    "base_model.model.": "PEFT",
    "_fsdp_wrapped_module.": "torch's FSDP",
    "_checkpoint_wrapped_module.": "torch's checkpoint_wrapper",
}


def read_state(folder: Path, weights: WeightFiles) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Return the tensors in the weight files by their names in the model, without reading their
    values, and warnings where transformers 4 reads them otherwise.

    Names without "model.", or with one too many, are read as transformers reads them. A tensor that
    is there twice is compared. Raises `CheckpointError` for two that differ, and for names under
    another prefix.
    """
    tensors: dict[str, LazyTensor] = {}
    files, stored_names = weights.files, []
    for file in files:
        for stored, tensor in read_state_dict(file).items():
            name = in_model(stored)
            stored_names.append(stored)
            named = tensor if name == stored else replace(tensor, name=name)
            if name not in tensors:
                tensors[name] = named
            elif not _equal(tensors[name], named):
                where = "in two shards" if len(files) > 1 else f"in {file.name} under two names"
                how = "which cannot be compared" if named.problem else "with different values"
                raise CheckpointError(
                    f"{folder}: the tensor {printable(name)} is {where}, {how}: remove one of them."
                )
    _refuse_prefix(folder, tensors)
    return tensors, tuple(_differences(folder, stored_names, weights))


def _differences(folder: Path, stored: Sequence[str], weights: WeightFiles) -> Iterator[str]:
    """Yield warnings where transformers 4 does not read the tensors with the names `stored`."""
    if weights.indexed is not None:
        unnamed = [name for name in stored if name not in weights.indexed]
        if unnamed:
            yield (
                f"{folder}: the index does not name {len(unnamed)} of the {len(stored)} tensors in "
                f"its shards, such as {printable(unnamed[0])}: they are read, as in transformers 5 "
                "(transformers 4 leaves them out)."
            )
    renamed = [name for name in stored if in_model(name) != name]
    if renamed and (HEAD in stored or renamed[0].startswith("model.")):
        yield (
            f"{folder}: the names of tensors such as {printable(renamed[0])} are read without or "
            "with 'model.', as in transformers 5 (transformers 4 does not load them)."
        )


def resolve_head(
    folder: Path, tensors: Mapping[str, LazyTensor], config: LlamaConfig
) -> tuple[dict[str, LazyTensor], LlamaConfig, tuple[str, ...]]:
    """Return tensors, config and warnings after a look at the head of a tied model.

    If only the head was saved, it is the embedding as well. If the saved head differs from the
    embedding, the model is not tied, whatever its config says: transformers 5 uses both.
    """
    found = dict(tensors)
    if not config.tie_word_embeddings or HEAD not in found:
        return found, config, ()
    if EMBEDDING not in found:
        found[EMBEDDING] = replace(found[HEAD], name=EMBEDDING)
        warning = (
            f"{folder}: the model is tied, and only {HEAD} was saved: it is used as the embedding "
            "too, as in transformers 5 (transformers 4 does not load it)."
        )
        return found, config, (warning,)
    if _equal(found[EMBEDDING], found[HEAD]):
        return found, config, ()
    warning = (
        f"{folder}: config.json says that embedding and head are tied, but {HEAD} has other values "
        "than the embedding: the saved head is used, as in transformers 5 (transformers 4 uses the "
        "embedding)."
    )
    return found, replace(config, tie_word_embeddings=False), (warning,)


def in_model(name: str) -> str:
    """Return the name in the model of the tensor stored as `name`.

    >>> [in_model(n) for n in ("norm.weight", "model.model.norm.weight", "model.lm_head.weight")]
    ['model.norm.weight', 'model.norm.weight', 'lm_head.weight']
    """
    if name.startswith(_PARTS):
        return f"model.{name}"
    inner = name.removeprefix("model.")
    if inner != name and inner.startswith(("lm_head.", *(f"model.{part}" for part in _PARTS))):
        return inner
    return name


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    try:
        return same_values(one, other)
    except UnsupportedError:  # codes of a quantized checkpoint
        return False


def _refuse_prefix(folder: Path, names: Iterable[str]) -> None:
    """Refuse a state dict of a model in a wrapper, whose names have its prefix."""
    names = list(names)
    inner = next(
        (name for name in names if _INNER.search(name) and name.startswith("model.")), None
    )
    if inner is not None:
        part = _INNER.findall(inner)[0]
        raise CheckpointError(
            f"{folder}: the names of tensors such as {printable(inner)} contain {part!r}, which "
            f"{_WRAPPERS[part]} adds, and a Llama's do not: save the model without its wrapper, or "
            "rename the tensors."
        )
    if any(name.startswith("model.") or name == HEAD for name in names):
        return
    match = next(filter(None, map(_PREFIXED.fullmatch, names)), None)
    if match is None:
        return
    prefix = printable(match[1])
    if any(".lora_" in name for name in names):
        raise CheckpointError(
            f"{folder} holds the tensors of an adapter ({printable(match[0])}), not of a model: "
            f"pass the base as SOURCE and the adapter with --adapter {folder}."
        )
    wrapper = _WRAPPERS.get(match[1])
    by = f", which {wrapper} adds" if wrapper else ""
    raise CheckpointError(
        f"{folder}: the names of the tensors begin with {prefix!r}{by}, and a Llama's with "
        "'model.': save the model without its wrapper, or rename the tensors."
    )
