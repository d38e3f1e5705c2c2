"""Which files of a Hugging Face folder hold its weights.

The order is that of transformers 5 (`_get_resolved_checkpoint_files` in modeling_utils.py): the
file that config.json names as `transformers_weights`, then model.safetensors, its index,
pytorch_model.bin, its index. Some folders that transformers does not load leave no doubt either
and are read as well. Every weight file that is left unread is named in a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_onnx.exporter.formats.json import read_json
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import file_inside, is_plain_name
from llama_onnx.targets.printable import printable

SINGLES = ("model.safetensors", "pytorch_model.bin")
"""Names of an unsharded weight file, the preferred format first. A sharded model has an index
instead, with `.index.json` appended to the name."""

ADAPTER_CONFIG = "adapter_config.json"

_WEIGHTS = re.compile(
    r".+\.safetensors|(pytorch_model|model|consolidated).*\.(bin|pth|pt)"
    r"|(tf_model|flax_model|model).*\.(h5|msgpack)|.+\.index\.json"
)
_SHARD = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")
_VARIANT = re.compile(r"(model|pytorch_model)\.([\w-]+?)(-\d+-of-\d+)?\.(safetensors|bin)")
_OTHER_FORMATS = re.compile(r"tf_model.*\.h5|flax_model.*\.msgpack|model.*\.onnx|rust_model.*\.ot")


@dataclass(frozen=True)
class WeightFiles:
    """The `files` to read, and `warnings` about those that are not read. `indexed` are the names of
    tensors in the index of the files; None without an index."""

    files: tuple[Path, ...]
    warnings: tuple[str, ...] = ()
    indexed: frozenset[str] | None = None


def find_weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """Return the weight files of `folder`, whose config.json holds `config`.

    Raises `CheckpointError` if there are none, or not all.
    """
    found = _named(folder, config) or _usual(folder) or _unusual(folder)
    if found is None:
        raise CheckpointError(_none_found(folder))
    return replace(found, warnings=(*found.warnings, *_unread(folder, found.files)))


def indexed_names(index: Path) -> list[str]:
    """Return the names of the shards listed in the file `index`; raises `CheckpointError` if it
    lists none."""
    return _shard_names(index, _weight_map(index))


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: download it again.")
    return weight_map


def _shard_names(index: Path, weight_map: Mapping[str, Any]) -> list[str]:
    names = set(map(str, weight_map.values()))
    for name in names:
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index} names the shard {name[:200]!r}, which is not a plain name inside its "
                "folder: download it again."
            )
    return sorted(names)


def _named(folder: Path, config: Mapping[str, Any]) -> WeightFiles | None:
    """Return the file, or the shards of the index, that config.json names."""
    name = config.get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{folder}: transformers_weights in config.json is {name!r}, but must name a "
            ".safetensors file or its index."
        )
    path = file_inside(folder, name)
    if path is None:
        raise CheckpointError(
            f"{folder} has no {printable(name)}, which config.json names as transformers_weights: "
            "download it."
        )
    return WeightFiles((path,)) if name.endswith(".safetensors") else _indexed(folder, path)


def _usual(folder: Path) -> WeightFiles | None:
    for single in SINGLES:
        if path := file_inside(folder, single):
            return WeightFiles((path,))
        if index := file_inside(folder, f"{single}.index.json"):
            return _indexed(folder, index)
    return None


def _indexed(folder: Path, index: Path) -> WeightFiles:
    weight_map = _weight_map(index)
    names = _shard_names(index, weight_map)
    found = {name: file_inside(folder, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(missing)} ({len(missing)} of {len(names)} shards "
            f"named in {index.name}): download the rest."
        )
    files = tuple(path for path in found.values() if path is not None)
    return WeightFiles(files, indexed=frozenset(weight_map))


def _unusual(folder: Path) -> WeightFiles | None:
    """Return the shards of a folder without an index if none is missing by their own count, or the
    only file with AutoGPTQ's name."""
    names = _names(folder)
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    for suffix in ("safetensors", "bin"):
        own = sorted((match for match in shards if match[4] == suffix), key=lambda m: int(m[2]))
        if not own:
            continue
        index = f"{own[0][1]}.{suffix}.index.json"
        numbers = [int(match[2]) for match in own]
        counts = {(match[1], int(match[3])) for match in own}
        if len(counts) > 1 or numbers != list(range(1, int(own[0][3]) + 1)):
            raise CheckpointError(
                f"{folder} has {suffix} shards but no {index}, and they are not one complete set: "
                "download the index and all shards."
            )
        files = tuple(_existing(folder, match[0]) for match in own)
        what = own[0][0] if len(own) == 1 else f"{own[0][0]} and the other {len(own) - 1}"
        return WeightFiles(
            files,
            (
                f"{folder} has no {index}: the weights are read from {what}, a complete set by its "
                "names; transformers does not load it without the index.",
            ),
        )
    gptq = [name for name in names if re.fullmatch(r"gptq_model-.*\.safetensors", name)]
    return WeightFiles((_existing(folder, gptq[0]),)) if len(gptq) == 1 else None


def _existing(folder: Path, name: str) -> Path:
    path = file_inside(folder, name)
    if path is None:
        raise CheckpointError(f"{folder / name} leads nowhere: download it again.")
    return path


def _none_found(folder: Path) -> str:
    """Return the sentence about a folder without weights, with what it has instead."""
    names = _names(folder)
    expected = " or ".join(SINGLES)
    for match in map(_VARIANT.fullmatch, names):
        if match:
            return (
                f"{folder} has the weights only as the variant {match[2]!r} ({match[0]}), and no "
                f"{expected}: rename its files without '.{match[2]}' to export it."
            )
    if "adapter_model.safetensors" in names or "adapter_model.bin" in names:
        return (
            f"{folder} has the weights of an adapter, and no {expected}: pass the base as SOURCE "
            f"and the adapter with --adapter {folder}."
        )
    others = [name for name in names if _OTHER_FORMATS.fullmatch(name)]
    if others:
        return (
            f"{folder} has {others[0]}, but no {expected}: load it with transformers and save it "
            "again with save_pretrained."
        )
    unknown = [name for name in names if name.endswith(".safetensors")]
    if unknown:
        return (
            f"{folder} has {unknown[0]}, but no {expected}: rename it to model.safetensors if it "
            "holds the whole model."
        )
    return f"{folder} has a config.json but no {expected}: download the weights."


def _unread(folder: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """Return warnings about the weight files and the adapter that are in `folder` and not read."""
    names = _names(folder)
    indexes = {f"{single}.index.json" for single in SINGLES} if len(files) > 1 else set()
    read = {file.name for file in files} | indexes
    left = [
        name
        for name in names
        if _WEIGHTS.fullmatch(name) and name not in read and not name.startswith("adapter_model.")
    ]
    left = [name for name in left if not _says_the_same(folder, name, read)]
    warnings = []
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        verb = "are" if more else "is"
        warnings.append(
            f"{folder}: the weights are read from {files[0].name}{others}; {left[0]}{more} {verb} "
            "not read."
        )
    if ADAPTER_CONFIG in names:
        warnings.append(
            f"{folder} also holds an adapter ({ADAPTER_CONFIG}), which is not merged: pass it with "
            "--adapter to merge it."
        )
    return tuple(warnings)


def _says_the_same(folder: Path, name: str, read: set[str]) -> bool:
    """Return whether `name` is an index that names only files that are read."""
    if not name.endswith(".index.json"):
        return False
    try:
        return read.issuperset(indexed_names(_existing(folder, name)))
    except CheckpointError:  # it is not needed, so it may be damaged
        return False


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}.") from None
