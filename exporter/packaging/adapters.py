"""LoRA adapters kept beside their base, for the runtime to swap while the model stays loaded.

The graph has A and B of every matrix that may change as inputs; an adapter file holds their values,
in the format that onnxruntime and onnxruntime-genai load. Nothing is rounded: an adapter is
float32 even if the base is quantized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_onnx.exporter.checkpoints.adapter_config import read_adapter_config
from llama_onnx.exporter.checkpoints.hub import source_name
from llama_onnx.exporter.checkpoints.lora import LowRank, adapter_files, open_adapter
from llama_onnx.exporter.formats.tensor import Float32, LazyTensor, file_fingerprint
from llama_onnx.exporter.model.checkpoint import Checkpoint, find_licences
from llama_onnx.exporter.model.config import MATRICES
from llama_onnx.runtime import ort
from llama_onnx.targets import strict_json
from llama_onnx.targets.errors import (
    CheckpointError,
    UnsupportedError,
    UsageError,
)
from llama_onnx.targets.folder_files import file_inside, read_inside
from llama_onnx.targets.graph_names import LORA_A, LORA_B, adapter_name
from llama_onnx.targets.package import ADAPTER_FOLDER, ADAPTER_SUFFIX

WRITING_MEMORY = 2.5
"""Memory needed to write an adapter, as a multiple of its file's size: onnxruntime builds the whole
file in memory beside a copy of the values (2.33 measured)."""

MAX_BYTES = (1 << 31) - (1 << 20)
"""Beyond 2 GiB onnxruntime writes a file that it cannot read, and reports no error."""

_KINDS = tuple(name.rpartition(".")[2] for name in MATRICES)

# File names that every system accepts, Windows included.
_NAME = re.compile(r"""(?![ .])[^<>:"/\\|?*\x00-\x1f\ud800-\udfff]{1,60}(?<![ .])""")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class KeptAdapter:
    """The adapter in the PEFT folder `folder`, opened but not read. `changes` are by module,
    `warnings` for people."""

    name: str
    folder: Path
    changes: Mapping[str, LowRank]
    warnings: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Its file in the package, as a relative path."""
        return f"{ADAPTER_FOLDER}/{self.name}{ADAPTER_SUFFIX}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of matrices it changes ("q_proj"), in the order in which a layer has them."""
        changed = {module.rpartition(".")[2] for module in self.changes}
        return tuple(kind for kind in _KINDS if kind in changed)

    @property
    def nbytes(self) -> int:
        """Bytes of its values in float32."""
        sides = [side for change in self.changes.values() for side in (change.left, change.right)]
        return 4 * sum(math.prod(side.shape) for side in sides)

    def fingerprint(self) -> dict[str, str]:
        """Return size and modification time of its files."""
        return file_fingerprint(adapter_files(self.folder))

    def licence_files(self) -> Sequence[Path]:
        """License, use policy, notice and model card beside it."""
        return find_licences(self.folder)

    def tokenizer_warning(self, package: Path) -> list[str]:
        """Return a warning if the tokenizer saved with it is not the one of `package`."""
        own, its = file_inside(self.folder, "tokenizer.json"), package / "tokenizer.json"
        if not (own and its.exists()):
            return []
        if read_inside(self.folder, own.name, max_bytes=strict_json.MAX_BYTES) == its.read_bytes():
            return []
        return [
            f"{own} differs from the package's tokenizer, which all its adapters share: if the "
            f"adapter {self.name} needs {own.name}, merge it into a separate package."
        ]

    def describe(self) -> dict[str, Any]:
        """Return its entry in the manifest: `rank` and `alpha` from adapter_config.json, `ranks`
        from its matrices."""
        config = read_adapter_config(self.folder)
        return {
            "file": self.file,
            "rank": config.rank,
            "alpha": config.alpha,
            "ranks": sorted({change.ranks[0] for change in self.changes.values()}),
            "targets": list(self.kinds),
            "matrices": len(self.changes),
            "source": {"name": source_name(self.folder), "files": self.fingerprint()},
        }

    def write(self, package: Path) -> None:
        """Write its file to `package`; the file appears complete or not at all.

        Needs `WRITING_MEMORY` times its size in memory. Raises `CheckpointError` for a value that
        is not finite, `ResourceError` when the file cannot be written.
        """
        values = {}
        for module, change in self.changes.items():
            # A is scaled rather than B, as when an adapter is merged.
            a = _values(change.right) * np.float32(change.scaling)
            for side, value in ((LORA_A, a), (LORA_B, _values(change.left))):
                values[adapter_name(module, side)] = value
        path = package / self.file
        path.parent.mkdir(exist_ok=True)
        ort.write_adapter(path, values)


def open_kept(base: Checkpoint, folders: Mapping[str, Path]) -> tuple[KeptAdapter, ...]:
    """Open the PEFT adapters in `folders`, by name. Reads headers only.

    Raises what `open_adapter` raises, `UnsupportedError` for an adapter that changes a module that
    cannot be swapped, and `UsageError` for a name that is not a valid file name.
    """
    _check_names(folders)
    return tuple(_open(base, name, folder) for name, folder in folders.items())


def swappable_kinds(adapters: Sequence[KeptAdapter]) -> tuple[str, ...]:
    """Return the kinds of matrices that must be swappable in a graph for all of `adapters`."""
    wanted = {kind for adapter in adapters for kind in adapter.kinds}
    return tuple(kind for kind in _KINDS if kind in wanted)


def named_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Return folders by name, from `NAME=DIR` or `DIR`, which is named after its folder.

    Raises `UsageError` when two have the same name.
    """
    folders: dict[str, Path] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or Path(value).exists():
            name, rest = source_name(Path(value)).rpartition("/")[2], value
        if name in folders:
            raise UsageError(
                f"two adapters are called {name!r}: rename one of them with NAME={rest}."
            )
        folders[name] = Path(rest)
    return folders


def read_parameters(path: Path) -> dict[str, Float32]:
    """Return the values in an adapter's file, by the names of the graph's inputs."""
    return ort.read_adapter(path)


def _open(base: Checkpoint, name: str, folder: Path) -> KeptAdapter:
    changes, opened = {}, open_adapter(base, folder)
    for tensor, change in opened.changes.items():
        module = tensor.removesuffix(".weight")
        if change.low_rank is None or module.rpartition(".")[2] not in _KINDS:
            how = "replaces" if change.whole else "changes"
            raise UnsupportedError(
                f"{folder} {how} {module}, which cannot be swapped at run time: merge this adapter "
                "into a separate package, without --keep-adapter."
            )
        changes[module] = change.low_rank
    adapter = KeptAdapter(name, folder, changes, opened.notes)
    if adapter.nbytes > MAX_BYTES:
        raise UnsupportedError(
            f"{folder} has {adapter.nbytes / 1e9:.2f} GB of values in float32, more than the 2 GiB "
            "that onnxruntime's adapter files hold: merge it, without --keep-adapter."
        )
    return adapter


def _values(tensor: LazyTensor) -> Float32:
    values = tensor.rows(0, tensor.shape[0])
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"{tensor.name} holds NaN or infinity: the adapter is damaged or its training diverged."
        )
    return np.ascontiguousarray(values)


def _check_names(folders: Mapping[str, Path]) -> None:
    seen: dict[str, str] = {}
    for name, folder in folders.items():
        if not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
            raise UsageError(
                f"{name!r} is not a valid file name for an adapter: pass another name, "
                f"NAME={folder}."
            )
        # Both would be the same file on a system that ignores case.
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise UsageError(
                f"the names {other!r} and {name!r} differ only in case: rename one of them."
            )
