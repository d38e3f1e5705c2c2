"""LoRA adapters in PEFT's layout: checkpoints that wrap a base and merge the adapter as they read.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds `scaling * B @ A` to a matrix. Rows of the result need
the same rows of B and all of A, so merging only needs memory for A, which is small.

Several adapters are nested: each is merged into the result of the previous ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llama_onnx.exporter.checkpoints.adapter_config import (
    CONFIG_FILE,
    AdapterConfig,
    read_adapter_config,
    saves,
)
from llama_onnx.exporter.formats.state_dict import read_state_dict
from llama_onnx.exporter.formats.tensor import Float32, LazyTensor, file_fingerprint
from llama_onnx.exporter.model.checkpoint import Checkpoint, OverBase, find_licences
from llama_onnx.exporter.model.config import LlamaConfig
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from llama_onnx.targets.folder_files import file_inside
from llama_onnx.targets.printable import printable

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """`scaling * left @ right`: left is [rows, rank], right [rank, columns].

    For a linear layer, B is left and A is right. PEFT stores an embedding's matrices the other way
    round, as A [rank, rows] and B [columns, rank], so both are `transposed`.
    """

    left: LazyTensor
    right: LazyTensor
    scaling: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product."""
        side = 1 if self.transposed else 0
        return (self.left.shape[side], self.right.shape[1 - side])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of left and right."""
        side = 1 if self.transposed else 0
        return (self.left.shape[1 - side], self.right.shape[side])

    def added_to(self, tensor: LazyTensor) -> LazyTensor:
        """Return `tensor` plus this product. The result caches matrices that it reads whole."""
        left, right = self.left, self.right
        if self.transposed:
            left, right = _transposed(left), _transposed(right)

        @functools.cache
        def scaled() -> Float32:
            return right.rows(0, right.shape[0]) * np.float32(self.scaling)

        def rows(start: int, stop: int) -> Float32:
            # The caller checks the rows for NaN and knows their names; numpy would only warn.
            with np.errstate(invalid="ignore", over="ignore"):
                return tensor.rows(start, stop) + left.rows(start, stop) @ scaled()

        nbytes = tensor.nbytes + left.nbytes + right.nbytes
        return replace(tensor, nbytes=nbytes, rows=rows, codes=None)


@dataclass(frozen=True)
class Change:
    """An adapter's change of a tensor: replace it with `whole`, add `low_rank`, or both."""

    whole: LazyTensor | None
    low_rank: LowRank | None

    def applied_to(self, tensor: LazyTensor) -> LazyTensor:
        """Return `tensor` with the change."""
        changed = replace(self.whole, name=tensor.name) if self.whole else tensor
        return self.low_rank.added_to(changed) if self.low_rank else changed


@dataclass(frozen=True)
class LoraCheckpoint(OverBase):
    """`base` with the adapter in `folder` merged; `changes` by Hugging Face tensor name, `notes`
    about the adapter for people.

    An adapter that changes the embedding or the head of a tied model changes only that one, as in
    PEFT, so the result is not tied.
    """

    base: Checkpoint
    folder: Path
    config: LlamaConfig
    changes: dict[str, Change]
    notes: tuple[str, ...] = ()

    def names(self) -> Iterable[str]:
        """Return the names of all tensors: the base's, and the head's if it is no longer tied."""
        head = () if self.config.tie_word_embeddings else (f"{_HEAD}.weight",)
        return {*self.base.names(), *head}

    def tensor(self, name: str) -> LazyTensor:
        """Return tensor `name`, merged. Reading rows raises `CheckpointError` if the adapter turns
        finite values into NaN or infinity."""
        tensor = self._original(name)
        if name not in self.changes:
            return tensor
        changed = self.changes[name].applied_to(tensor)

        def rows(start: int, stop: int) -> Float32:
            found = changed.rows(start, stop)
            if not np.isfinite(found).all() and np.isfinite(tensor.rows(start, stop)).all():
                raise CheckpointError(
                    f"{self.folder}: the adapter gives NaN or infinity in {name}, rows {start} to "
                    f"{stop - 1}: it is damaged, or its training diverged."
                )
            return found

        return replace(changed, rows=rows)

    def write_tokenizer(self, folder: Path) -> list[str]:
        """Write the tokenizer saved with the adapter, if any, else the base's."""
        if (self.folder / "tokenizer.json").exists():
            from llama_onnx.exporter.tokenizer.json_file import copy_tokenizer

            return copy_tokenizer(self.folder, folder, self.config.max_position_embeddings)
        return self.base.write_tokenizer(folder)

    def licence_files(self) -> Sequence[Path]:
        """Return the files of the base and of the adapter."""
        return [*self.base.licence_files(), *find_licences(self.folder)]

    def fingerprint(self) -> dict[str, str]:
        """Return those of the base and the adapter, numbered because their order matters."""
        number = len(adapters_of(self))
        files = file_fingerprint(adapter_files(self.folder))
        own = {f"adapter {number}/{name}": value for name, value in files.items()}
        return {**self.base.fingerprint(), **own}

    def warnings(self) -> Sequence[str]:
        """Return the base's and the adapter's."""
        return (*self.base.warnings(), *self.notes)

    def _original(self, name: str) -> LazyTensor:
        if name == f"{_HEAD}.weight" and self.base.config.tie_word_embeddings:
            return replace(self.base.tensor(f"{_EMBEDDING}.weight"), name=name)
        return self.base.tensor(name)


def adapters_of(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the folders of the adapters merged into `checkpoint`, in the order of merging."""
    if isinstance(checkpoint, LoraCheckpoint):
        return (*adapters_of(checkpoint.base), checkpoint.folder)
    return ()


def tokenizer_home(checkpoint: Checkpoint) -> Path:
    """Return the folder or file that the tokenizer of an export is from: of the last adapter that
    has one, or else of the base."""
    if not isinstance(checkpoint, LoraCheckpoint):
        return checkpoint.path
    if file_inside(checkpoint.folder, "tokenizer.json"):
        return checkpoint.folder
    return tokenizer_home(checkpoint.base)


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of the adapter in `folder`; raises `CheckpointError` without weights."""
    return [folder / CONFIG_FILE, _weights_file(folder)]


def open_adapter(base: Checkpoint, folder: Path) -> LoraCheckpoint:
    """Return `base` with the PEFT adapter in `folder` merged. Reads headers only.

    Raises `CheckpointError` for an adapter that is damaged, inconsistent or made for another base,
    `UnsupportedError` for one that is not plain LoRA.
    """
    config = read_adapter_config(folder)
    tensors = read_state_dict(_weights_file(folder))
    # An adapter may change the head of any base, which is then no longer tied.
    shapes = replace(base.config, tie_word_embeddings=False).tensor_shapes()
    modules = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
    changes = {}
    for module, shape in modules.items():
        change = _take_change(module, shape, config, tensors)
        if change.whole or change.low_rank:
            changes[f"{module}.weight"] = change
    if tensors:
        raise CheckpointError(
            f"{folder} has the tensor {next(iter(tensors))}, which matches nothing in {base.path}: "
            f"{_made_for(config)}."
        )
    notes = (*config.warnings, *_unmatched(config, modules))
    if not changes:
        raise CheckpointError(f"{folder} changes nothing: it has no module of the base.")
    return LoraCheckpoint(base, folder, _untied(base, changes, config), changes, notes)


def _weights_file(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, PICKLED_FILE):
        if file := file_inside(folder, name):
            return file
    raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}: download it too.")


def _take_change(
    module: str, shape: tuple[int, ...], config: AdapterConfig, tensors: dict[str, LazyTensor]
) -> Change:
    """Return the change of `module`, and remove its tensors from `tensors`."""

    def take(part: str) -> LazyTensor | None:
        return tensors.pop(f"{_PREFIX}{module}.{part}", None)

    whole = take("weight") or take("base_layer.weight")
    transposed = module == _EMBEDDING
    if transposed:
        left, right = take("lora_embedding_A"), take("lora_embedding_B")
    else:
        left, right = take("lora_B.weight"), take("lora_A.weight")
    _check_whole(module, shape, config, whole)
    if len(shape) < 2 or not config.adds_to(module):
        if left or right:
            raise CheckpointError(
                f"{config.where} does not target {module}, but {WEIGHTS_FILE} has a change of it: "
                "the two files are from different adapters."
            )
        return Change(whole, None)
    if not left or not right:
        raise CheckpointError(
            f"{config.where.parent} lacks the tensors that change {module}, which "
            f"{CONFIG_FILE} targets: the file is incomplete, or {_made_for(config)}."
        )
    low_rank = LowRank(left, right, config.scaling_of(module), transposed)
    _check_low_rank(module, shape, config, low_rank)
    return Change(whole, low_rank)


def _check_whole(
    module: str, shape: tuple[int, ...], config: AdapterConfig, whole: LazyTensor | None
) -> None:
    folder, replaced = config.where.parent, config.replaces(module)
    if whole is None:
        if replaced:
            raise CheckpointError(
                f"{folder} lacks the tensor {_PREFIX}{module}.weight, which modules_to_save in "
                f"{CONFIG_FILE} requires: download it again."
            )
        return
    # PEFT also saves embedding and head on its own if they may have changed.
    if not replaced and module not in (_EMBEDDING, _HEAD):
        raise CheckpointError(
            f"{folder} has the tensor {whole.name}, which modules_to_save in {CONFIG_FILE} does "
            "not name: the two files are from different adapters."
        )
    if whole.shape == shape:
        return
    if len(shape) == len(whole.shape) == 2 and shape[1] == whole.shape[1]:
        raise UnsupportedError(
            f"{folder} has {whole.shape[0]} rows for {module}, but the base {shape[0]}: a resized "
            "vocabulary is not supported; merge with PEFT's merge_and_unload and export the result."
        )
    raise CheckpointError(
        f"{folder}: {whole.name} has shape {list(whole.shape)}, but the base's is {list(shape)}: "
        f"{_made_for(config)}."
    )


def _check_low_rank(
    module: str, shape: tuple[int, ...], config: AdapterConfig, found: LowRank
) -> None:
    folder = config.where.parent
    if len(found.left.shape) != 2 or len(found.right.shape) != 2:
        raise CheckpointError(f"{folder} is damaged: the change of {module} is not two matrices.")
    if found.shape != shape:
        raise CheckpointError(
            f"{folder} changes a {module} of shape {list(found.shape)}, but the base's is "
            f"{list(shape)}: {_made_for(config)}."
        )
    rank = config.rank_of(module)
    if found.ranks != (rank, rank):
        ranks = " and ".join(str(found_rank) for found_rank in sorted(set(found.ranks)))
        raise CheckpointError(
            f"{folder}: the change of {module} has rank {ranks}, but {CONFIG_FILE} says {rank}: "
            "the two files are from different adapters."
        )


def _unmatched(config: AdapterConfig, modules: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield warnings about names that match no module of the base: PEFT ignores them as long as
    another one matches. Its tensors show that the adapter is complete.

    Raises `CheckpointError` if no name matches, or if one matches something other than a matrix.
    """
    matrices = [module for module, shape in modules.items() if len(shape) == 2]
    targets = config.targets if isinstance(config.targets, tuple) else ()
    unknown = [name for name in targets if not _ends(name, matrices)]
    for name in unknown:
        if _ends(name, modules) or len(unknown) == len(targets):
            raise CheckpointError(
                f"{config.where}: target_modules names {name!r}, but the base has no such matrix: "
                f"{_made_for(config)}."
            )
    unsaved = [name for name in config.saved if not any(saves(name, m) for m in modules)]
    if unsaved and len(unsaved) == len(config.saved):
        raise CheckpointError(
            f"{config.where}: modules_to_save names {unsaved[0]!r}, but the base has no such "
            f"module: {_made_for(config)}."
        )
    for key, names in (("target_modules", unknown), ("modules_to_save", unsaved)):
        if names:
            yield (
                f"{config.where}: {key} names {printable(', '.join(names))}, which the base does "
                "not have: ignored, as PEFT does."
            )


def _ends(name: str, modules: Iterable[str]) -> bool:
    return any(f".{module}".endswith(f".{name}") for module in modules)


def _untied(base: Checkpoint, changes: dict[str, Change], config: AdapterConfig) -> LlamaConfig:
    touched = changes.keys() & {f"{_EMBEDDING}.weight", f"{_HEAD}.weight"}
    if not base.config.tie_word_embeddings or not touched:
        return base.config
    if config.keeps_tied:
        raise UnsupportedError(
            f"{config.where}: ensure_weight_tying with a changed embedding is not supported: merge "
            "with PEFT's merge_and_unload and export the result."
        )
    return replace(base.config, tie_word_embeddings=False)


def _made_for(config: AdapterConfig) -> str:
    name = f" ({config.base_name})" if config.base_name else ""
    return f"the adapter was made for another base{name}"


def _transposed(tensor: LazyTensor) -> LazyTensor:
    @functools.cache
    def whole() -> Float32:
        return tensor.rows(0, tensor.shape[0]).T

    return replace(tensor, shape=tensor.shape[::-1], rows=lambda start, stop: whole()[start:stop])
