"""LoRA adapters kept beside their base, for the runtime to swap while the model stays loaded.

The graph has A and B of every matrix that may change as inputs (`graph.layers.Linear`); an
adapter file gives them values, in the format that onnxruntime and onnxruntime-genai load. Nothing
is rounded: an adapter is float32 whatever the base is stored as.
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
from llama_onnx.targets.errors import (
    CheckpointError,
    ResourceError,
    UnsupportedError,
    UsageError,
)
from llama_onnx.targets.graph_names import LORA_A, LORA_B, adapter_name
from llama_onnx.targets.package import ADAPTER_FOLDER, ADAPTER_SUFFIX

WRITING_MEMORY = 2.5
"""Memory that writing an adapter takes, in sizes of its file: onnxruntime builds it as a whole
behind a copy of the values (2.33 measured)."""

MAX_BYTES = (1 << 31) - (1 << 20)
"""Beyond 2 GiB onnxruntime writes, without a word, a file that it cannot read."""

_KINDS = tuple(name.rpartition(".")[2] for name in MATRICES)

# What every system takes for a file's name, Windows included.
_NAME = re.compile(r"""(?![ .])[^<>:"/\\|?*\x00-\x1f\ud800-\udfff]{1,60}(?<![ .])""")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class KeptAdapter:
    """The adapter of the PEFT folder `folder`, opened but not read: `changes` by module."""

    name: str
    folder: Path
    changes: Mapping[str, LowRank]

    @property
    def file(self) -> str:
        """Its place in the package."""
        return f"{ADAPTER_FOLDER}/{self.name}{ADAPTER_SUFFIX}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of matrices it changes, in the order in which a layer has them."""
        changed = {module.rpartition(".")[2] for module in self.changes}
        return tuple(kind for kind in _KINDS if kind in changed)

    @property
    def nbytes(self) -> int:
        """Bytes of its values in float32."""
        sides = [side for change in self.changes.values() for side in (change.left, change.right)]
        return 4 * sum(math.prod(side.shape) for side in sides)

    def fingerprint(self) -> dict[str, str]:
        """Size and modification time of its files."""
        return file_fingerprint(adapter_files(self.folder))

    def licence_files(self) -> Sequence[Path]:
        """Licence, use policy, notice and model card beside it."""
        return find_licences(self.folder)

    def tokenizer_warning(self, package: Path) -> list[str]:
        """For people: that the tokenizer saved with it is not the one of `package`."""
        own = self.folder / "tokenizer.json"
        if not own.exists() or own.read_bytes() == (package / "tokenizer.json").read_bytes():
            return []
        return [
            f"{own} is not the base's, which the package has for all: if the adapter {self.name} "
            "needs its own, merge it into a package of its own."
        ]

    def describe(self) -> dict[str, Any]:
        """Its entry in the manifest; rank and alpha are adapter_config.json's own, `ranks` those
        of the matrices."""
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
        """Write its file into `package`, whole or not at all.

        Takes memory of `WRITING_MEMORY` times its size. Raises `CheckpointError` for a value that
        is not finite, `ResourceError` when the disk does not take the file.
        """
        import onnxruntime as ort

        values = {}
        for module, change in self.changes.items():
            # A is scaled, as it is where an adapter is merged.
            a = _values(change.right) * np.float32(change.scaling)
            for side, value in ((LORA_A, a), (LORA_B, _values(change.left))):
                name = adapter_name(module, side)
                values[name] = ort.OrtValue.ortvalue_from_numpy(value)
        file = ort.AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        file.set_parameters(values)
        path = package / self.file
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            file.export_adapter(str(temporary))
            temporary.replace(path)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ResourceError(f"{path} cannot be written: is the disk full? {reason}") from None
        finally:
            temporary.unlink(missing_ok=True)


def open_kept(base: Checkpoint, folders: Mapping[str, Path]) -> tuple[KeptAdapter, ...]:
    """Open the PEFT adapters in `folders`, by the names they are to have. Reads headers only.

    Raises what `open_adapter` raises, `UnsupportedError` for an adapter that changes what cannot be
    swapped, and `UsageError` for names that cannot be a file's.
    """
    _check_names(folders)
    return tuple(_open(base, name, folder) for name, folder in folders.items())


def swappable_kinds(adapters: Sequence[KeptAdapter]) -> tuple[str, ...]:
    """The kinds of matrices that a graph has to offer for all of `adapters`."""
    wanted = {kind for adapter in adapters for kind in adapter.kinds}
    return tuple(kind for kind in _KINDS if kind in wanted)


def named_adapters(values: Sequence[str]) -> dict[str, Path]:
    """Folders by name, from `DIR` (called as the folder is) or `NAME=DIR`.

    Raises `UsageError` when two have one name.
    """
    folders: dict[str, Path] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or Path(value).exists():
            name, rest = source_name(Path(value)).rpartition("/")[2], value
        if name in folders:
            raise UsageError(
                f"two adapters are called {name!r}: give one a name of its own, "
                f"--adapter NAME={rest}."
            )
        folders[name] = Path(rest)
    return folders


def read_parameters(path: Path) -> dict[str, Float32]:
    """The values in an adapter's file, by the names of the graph's inputs."""
    import onnxruntime as ort

    parameters = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
    # Copied: numpy's view of a parameter does not keep the memory behind it alive.
    return {name: value.numpy().copy() for name, value in parameters.items()}


def _open(base: Checkpoint, name: str, folder: Path) -> KeptAdapter:
    changes = {}
    for tensor, change in open_adapter(base, folder).changes.items():
        module = tensor.removesuffix(".weight")
        if change.low_rank is None or module.rpartition(".")[2] not in _KINDS:
            how = "replaces" if change.whole else "changes"
            raise UnsupportedError(
                f"{folder} {how} {module}, which cannot be swapped at run time: merge this adapter "
                "into a package of its own, without --keep-adapter."
            )
        changes[module] = change.low_rank
    adapter = KeptAdapter(name, folder, changes)
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
            f"{tensor.name} holds NaN or infinity: the adapter is damaged, or its training "
            "diverged."
        )
    return np.ascontiguousarray(values)


def _check_names(folders: Mapping[str, Path]) -> None:
    seen: dict[str, str] = {}
    for name, folder in folders.items():
        if not _NAME.fullmatch(name) or _RESERVED.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot be the name of an adapter's file: give it another one, "
                f"--adapter NAME={folder}."
            )
        # One file on a system that does not tell capitals from small letters.
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise UsageError(
                f"the names {other!r} and {name!r} differ in capitals alone: give one another name."
            )
