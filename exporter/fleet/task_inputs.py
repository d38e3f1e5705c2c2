"""What a task makes its package from, so that a later run can tell whether anything changed.

A file is known by its sha256. It is read again only if its state changed: size, times of
modification and of the last change of its inode, and the inode itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_onnx.exporter.checkpoints.download import local_copy
from llama_onnx.exporter.checkpoints.hub import HubId
from llama_onnx.exporter.fleet.fleet_task import Task
from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.packaging.adapters import KeptAdapter, named_adapters, open_kept
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.packaging.provenance import source_path
from llama_onnx.exporter.packaging.unchanged import source_state
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.listing import hash_file

State = list[int] | None
"""Of a file, as JSON carries it; None for one that is not there."""


@dataclass(frozen=True)
class Opened:
    """A task's source: its headers, the adapters that stay apart, and the files that are read."""

    source: Path
    merged: tuple[Path, ...]
    folders: Mapping[str, Path]
    options: Options
    checkpoint: Checkpoint
    kept: tuple[KeptAdapter, ...]
    files: tuple[Path, ...]


def open_task(task: Task) -> Opened:
    """Open the source of `task`, downloading it if it is on the hub.

    Raises `LlamaOnnxError` for what `export` refuses about source, adapters and options.
    """
    hub = HubId.parse(task.source)
    source = local_copy(Path(task.source) if hub is None else hub)
    options = Options(**task.options)
    merged = () if task.keep_adapter else tuple(map(Path, task.adapters))
    folders = named_adapters(task.adapters) if task.keep_adapter else {}
    checkpoint = open_checkpoint(source, merged, context=options.context)
    kept = tuple(open_kept(checkpoint, folders))
    files = [*source_state(checkpoint, kept), *checkpoint.licence_files()]
    files += [Path(text) for text in (options.calibration, options.recipe) if text]
    return Opened(source, merged, folders, options, checkpoint, kept, tuple(dict.fromkeys(files)))


def export_inputs(task: Task, base: Path) -> dict[str, Any]:
    """Return what the package depends on besides the contents of files; paths as seen from the
    folder `base`."""
    return {
        "version": version("llama-onnx"),
        "target": task.target,
        "options": dict(task.options),
        "adapters": [_adapter(one, base) for one in task.adapters],
        "keep_adapter": task.keep_adapter,
        "tokenizer": task.tokenizer,
    }


def _adapter(text: str, base: Path) -> str:
    name, equals, folder = text.rpartition("=")
    return f"{name}{equals}{_name(Path(folder), base)}"


def states(files: Iterable[Path], base: Path) -> dict[str, State]:
    """Return the state of each file, by its name as seen from the folder `base`."""
    return {_name(file, base): _state(file) for file in files}


def _name(file: Path, base: Path) -> str:
    try:
        return Path(os.path.relpath(file, base)).as_posix()
    except ValueError:  # another drive of Windows
        return file.as_posix()


def _state(file: Path) -> State:
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def same_content(
    known: Mapping[str, str | None],
    old: Mapping[str, State],
    now: Mapping[str, State],
    files: Iterable[Path],
    base: Path,
) -> bool:
    """Whether the files have the content whose hashes are `known`, and there are no others.

    Only those are read whose state in `now` is not that in `old`.
    """
    if known.keys() != now.keys():
        return False
    changed = {name for name in now if now[name] != old.get(name)}
    if any(_size(old.get(name)) != _size(now[name]) for name in changed):
        return False
    paths = {_name(file, base): file for file in files}
    return all(known[name] is None or _hash(paths[name]) == known[name] for name in changed)


def _size(state: State) -> int | None:
    return state[0] if state else None


def hashes(opened: Opened, manifest: Mapping[str, Any], base: Path) -> dict[str, str | None]:
    """Return the sha256 of each file; those that the export read for its manifest are not read
    again."""
    found = manifest["source"]["hashes"] or {}
    read = {
        _name(source_path(opened.checkpoint, name), base): sha256
        for name, sha256 in found.get("sha256", {}).items()
    }
    return {
        name: (_hash(file) if file.exists() else None) if name not in read else read[name]
        for name, file in ((_name(file, base), file) for file in opened.files)
    }


def _hash(file: Path) -> str:
    try:
        return hash_file(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from None
