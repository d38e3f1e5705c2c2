"""The settings that were found for a package on this machine: kept, found again, forgotten.

`CACHE/tuned/PACKAGE/MACHINE.json` is a record; PACKAGE is the manifest's hash and MACHINE that of
`Machine`. The record names the folders beside it that hold packed weights and a graph for prompts,
if there are any. It is written last and whole, so what a killed `tune` leaves is never read. Nobody
but this user may be able to write any of it: a graph and weights are executed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_onnx.runtime.engine.engine_settings import DEFAULT, EngineSettings
from llama_onnx.runtime.engine.head_rows import choose_rows
from llama_onnx.runtime.measure.jsontext import dumps
from llama_onnx.runtime.ort import check_threads
from llama_onnx.runtime.tuning.cache_folder import (
    UntrustedError,
    cache_folder,
    check_private,
    make_private,
)
from llama_onnx.runtime.tuning.machine import Machine, this_machine
from llama_onnx.targets.durable import replacing
from llama_onnx.targets.errors import LlamaOnnxError, ResourceError, describe_reason
from llama_onnx.targets.folder_files import is_plain_name
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.lock import locked
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage
from llama_onnx.targets.provider import Provider
from llama_onnx.targets.providers import CPU
from llama_onnx.targets.strict_json import JSONError, parse_json

log = logging.getLogger("llama_onnx.engine")

IGNORE = "LLAMA_ONNX_TUNED"
"""Set this variable to 0 to run packages as if they were not tuned."""

FORMAT_VERSION = 2
"""Of the records, and of what writes the folders: raise it when `write_prompt_graph` changes."""

PACKED_SUFFIX, PROMPTS_SUFFIX = ".packed", ".prompts"
_FOLDERS: Mapping[str, str] = {"packed": PACKED_SUFFIX, "prompts": PROMPTS_SUFFIX}
"""Settings that are folders beside the record -> how the names of those folders end."""

_MOST_BYTES = 1 << 20
_CHUNKS = range(16, 1 << 16)


@dataclass(frozen=True)
class Tuned:
    """Settings for a package on this machine; `gain` is how much faster they were than the
    defaults, 0.1 for a tenth."""

    settings: EngineSettings
    gain: float


@dataclass(frozen=True)
class Place:
    """Where the cache has what was found for a package on a machine."""

    root: Path
    folder: Path
    machine: Machine

    @property
    def record(self) -> Path:
        """The file that says which settings to use."""
        return self.folder / f"{self.machine.key}.json"


def place_of(package: ModelPackage, machine: Machine | None = None) -> Place | None:
    """Return where to keep settings for `package`; None if there is no folder for caches."""
    root = cache_folder()
    if root is None:
        return None
    return Place(root, root / "tuned" / hash_file(package.index)[:16], machine or this_machine())


def require_place(package: ModelPackage) -> Place:
    """Do the same; raise `ResourceError` if there is none."""
    place = place_of(package)
    if place is None:
        raise ResourceError(
            "this user has no folder for caches: set HOME (on Windows LOCALAPPDATA) to a folder."
        )
    return place


def find(package: ModelPackage, *, thorough: bool = False) -> Tuned | None:
    """Return what was found for `package` on this machine; None if it was not tuned here.

    `thorough`: read all files beside the record and compare their hashes; otherwise sizes and times
    of weights are compared. Raises `ResourceError` for what cannot be trusted or is damaged.
    """
    place = place_of(package)
    if place is None:
        return None
    try:
        check_private(place.root, place.record)
        record = parse_json(_read(place.record), max_bytes=_MOST_BYTES)
        if record["format_version"] != FORMAT_VERSION:
            raise UntrustedError(f"another version of llama-onnx wrote {place.record}")
        settings = _settings(record["settings"])
        found = {name: _kept(name, record, place, package, thorough) for name in _FOLDERS}
        settings = replace(settings, packed=found["packed"], prompts=found["prompts"])
        return Tuned(settings, float(record["gain"]))
    except FileNotFoundError as error:
        if Path(error.filename) == place.record or not place.record.exists():
            return None
        raise _ignored(f"{error.filename} is missing") from None
    except UntrustedError as problem:
        raise _ignored(str(problem)) from None
    except OSError as error:
        raise _ignored(f"{place.record}: {describe_reason(error)}") from None
    except (JSONError, KeyError, TypeError, ValueError, LlamaOnnxError):
        raise _ignored(f"{place.record} is damaged") from None


def reads_prompts_apart(package: ModelPackage) -> bool:
    """Return whether a graph for prompts is kept for `package` on this machine."""
    try:
        tuned = find(package)
    except LlamaOnnxError:
        return False
    return tuned is not None and tuned.settings.prompts is not None


def choose(
    package: ModelPackage, provider: Provider, threads: int | None = None
) -> tuple[EngineSettings, str | None]:
    """Return how to run `package` on `provider` here, and what to tell the user about that, if
    anything; a number of `threads` that the user chose stays."""
    if provider != CPU or os.environ.get(IGNORE) == "0":
        return DEFAULT, None
    try:
        tuned = find(package)
    except LlamaOnnxError as problem:
        log.warning("%s", problem)
        return DEFAULT, str(problem)
    settings = DEFAULT if tuned is None else tuned.settings
    if threads is not None:
        settings = replace(settings, threads=None)
    found = settings.differences()
    return settings, f"tuned for this machine: {', '.join(found)}." if found else None


@contextmanager
def tuning(place: Place) -> Iterator[None]:
    """Keep other processes from tuning the same package meanwhile, and tidy up before and after.

    Raises `ResourceError` if the cache cannot be written, `UsageError` if another is tuning.
    """
    make_private(place.root, place.folder)
    lock = place.folder / "lock"
    busy = f"another process is tuning this package ({lock}): wait until it has finished."
    try:
        with locked(lock, busy):
            _remove_leftovers(place.folder)
            try:
                yield
            finally:
                _remove_leftovers(place.folder)
    except PermissionError as error:
        raise ResourceError(
            f"{error.filename or place.folder} cannot be written: {describe_reason(error)}."
        ) from None


def keep(place: Place, package: ModelPackage, tuned: Tuned, measured: Mapping[str, Any]) -> None:
    """Write the record, with the hashes of the folders' files, which takes a while. Numbers in
    `measured` that are not finite become null."""
    folders = {name: getattr(tuned.settings, name) for name in _FOLDERS}
    content = {
        "format_version": FORMAT_VERSION,
        "machine": place.machine.to_json(),
        "settings": tuned.settings.to_json(),
        "gain": tuned.gain,
        **{name: folder and _described(folder, package) for name, folder in folders.items()},
        "measured": measured,
    }
    with replacing(place.record) as file:
        file.write(dumps(content).encode())


def _described(folder: Path, package: ModelPackage) -> dict[str, Any]:
    files = describe_files(folder)
    return {"folder": folder.name, "graph": graph_hash(package), "files": files}


def graph_hash(package: ModelPackage) -> str:
    """Return the sha256 of the graph as this version's engine runs it."""
    return hashlib.sha256(choose_rows(package.model_path.read_bytes())).hexdigest()


def describe_files(folder: Path) -> dict[str, Any]:
    """Return size, time and hash of graph and weights, by which they are recognized later."""
    return {
        name: {**_identity(folder / name), "sha256": hash_file(folder / name)}
        for name in (MODEL_FILE, DATA_FILE)
    }


def forget(package: ModelPackage) -> bool:
    """Remove all that was kept for `package`, for other versions of onnxruntime too; return whether
    there was anything. Raises `UsageError` while it is being tuned."""
    place = place_of(package)
    if place is None or not place.folder.is_dir():
        return False
    there = any(place.folder.glob("*.json"))
    with tuning(place):
        for record in place.folder.glob("*.json"):
            record.unlink()
    return there


def tuned_elsewhere(package: ModelPackage) -> bool:
    """Return whether it was tuned for another processor, or another version of onnxruntime."""
    place = place_of(package)
    return place is not None and any(p != place.record for p in place.folder.glob("*.json"))


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_MOST_BYTES + 1)


def _settings(content: Mapping[str, Any]) -> EngineSettings:
    threads, chunk = content["threads"], content["chunk"]
    flags = {name: content[name] for name in ("spin", "arena", "drafts", "tiled_attention")}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError("flags")
    if type(chunk) is not int or chunk not in _CHUNKS:
        raise ValueError("chunk")
    return EngineSettings(None if threads is None else check_threads(threads), chunk=chunk, **flags)


def _kept(
    name: str, record: Mapping[str, Any], place: Place, package: ModelPackage, thorough: bool
) -> Path | None:
    """Return the folder that a record names for the setting `name`; None if it names none."""
    content = record.get(name)
    if content is None:
        return None
    if content["graph"] != graph_hash(package):
        raise UntrustedError(f"another version of llama-onnx wrote {content['folder']}")
    return _folder(place, content, _FOLDERS[name], thorough)


def _folder(place: Place, content: Mapping[str, Any], suffix: str, thorough: bool) -> Path:
    """Return a folder that was written, after all checks."""
    name = content["folder"]
    if not isinstance(name, str) or not is_plain_name(name):
        raise ValueError("folder")
    if "/" in name or not name.endswith(suffix):
        raise ValueError("folder")
    folder: Path = place.folder / name
    for file in (MODEL_FILE, DATA_FILE):
        check_private(place.root, folder / file)
        known = content["files"][file]
        same = all(known[key] == value for key, value in _identity(folder / file).items())
        # The graph is small; it says which parts of the data file to read.
        if same and (thorough or file == MODEL_FILE):
            same = hash_file(folder / file) == known["sha256"]
        if not same:
            raise UntrustedError(f"{folder / file} is not the file that was written")
    return folder


def _identity(file: Path) -> dict[str, int]:
    status = file.stat()
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns}


def _remove_leftovers(folder: Path) -> None:
    """Remove folders that no record names: of a killed `tune`, or replaced by others."""
    named = set[str]()
    for record in folder.glob("*.json"):
        try:
            content = parse_json(_read(record), max_bytes=_MOST_BYTES)
            named.update(kept["folder"] for name in _FOLDERS if (kept := content.get(name)))
        except (OSError, JSONError, AttributeError, KeyError, TypeError):
            record.unlink(missing_ok=True)  # damaged: nobody could use it
    for path in folder.iterdir():
        if path.suffix in _FOLDERS.values() and path.name not in named:
            # On Windows a program that still has it mapped keeps it: the next `tune` removes it.
            shutil.rmtree(path, ignore_errors=True)


def _ignored(reason: str) -> ResourceError:
    return ResourceError(f"the tuned settings are ignored: {reason}; run `llama-onnx tune` again.")
