"""ONNX Runtime's model packages: packages for several targets as variants of one, weights once.

The layout is that of `onnxruntime.ModelPackage`. Its index is called manifest.json as ours is, but
describes variants; ours are inside, one in the folder of each target, complete but for the weights.
Those are in one data file, which has equal tensors once, and `shared.onnx` is the package's graph
with their places in it. So a package can be taken out again, byte for byte as it was.
https://github.com/microsoft/onnxruntime/tree/main/model_package
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llama_onnx.runtime.bundles.make import new_folder
from llama_onnx.targets.errors import PackageError, UsageError
from llama_onnx.targets.folder_files import file_inside, is_plain_name, open_inside, read_inside
from llama_onnx.targets.listing import signature_files
from llama_onnx.targets.onnx_file import GraphError, Weights, read_model
from llama_onnx.targets.package import DATA_FILE, MANIFEST, MODEL_FILE, ModelPackage
from llama_onnx.targets.package_json import read_package_json
from llama_onnx.targets.protobuf import BYTES, WireError, encode, fields
from llama_onnx.targets.registry import get_target
from llama_onnx.targets.sizes import next_offset

COMPONENT = "decoder"
SHARED_GRAPH = "shared.onnx"
_ASSETS = "shared_assets"
_MAX_GRAPH, _MAX_JSON = 1 << 30, 1 << 20
_CHUNK = 1 << 20
_MOST_REPEATED = 4
"""How many times as large as what is stored a data file may be."""


@dataclass(frozen=True)
class Combined:
    """A finished model package: the `targets` in it, the bytes of weights before and in it."""

    path: Path
    targets: tuple[str, ...]
    weight_bytes: int
    stored_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "model_package": str(self.path),
            "targets": list(self.targets),
            "weight_bytes": self.weight_bytes,
            "stored_bytes": self.stored_bytes,
        }


def combine(packages: Sequence[ModelPackage], out: Path) -> Combined:
    """Write a model package with `packages`, made from one checkpoint, to the new folder `out`.

    Raises `UsageError` if two are for one target or made from different checkpoints, `PackageError`
    for a damaged one.
    """
    _check(packages)
    with new_folder(out) as folder:
        assets = folder / _ASSETS
        (assets / "weights").mkdir(parents=True)
        data = assets / "weights" / DATA_FILE
        known: dict[bytes, int] = {}
        with data.open("xb") as stored:
            for package in packages:
                _add(package, folder / COMPONENT / package.target, stored, known)
        uri = _asset_uri(data)
        (assets / "weights").rename(assets / uri.replace(":", "-"))
        _write_json(folder / COMPONENT / "component.json", _component(packages, uri))
        index = {"schema_version": "1.0", "components": {COMPONENT: COMPONENT}}
        _write_json(folder / MANIFEST, index)
        size = (assets / uri.replace(":", "-") / DATA_FILE).stat().st_size
    before = sum(package.data_path.stat().st_size for package in packages)
    return Combined(out, tuple(package.target for package in packages), before, size)


def extract(path: Path, target: str, out: Path) -> ModelPackage:
    """Take the package for `target` out of the model package `path`, into the new folder `out`.

    Raises `UsageError` if there is none for that target, `PackageError` if it is damaged: what is
    written has the sizes and hashes of the package's own manifest.
    """
    variant = _variant(path, target)
    data = _data_file(path, variant, target)
    folder = path / COMPONENT / target
    listed = ModelPackage.unchecked(folder)
    if listed is None:
        raise PackageError(f"{folder} is damaged: it has no valid {MANIFEST} of a package.")
    with new_folder(out) as made:
        _copy_small(listed, made)
        _restore(folder, data, listed, made / DATA_FILE)
        if altered := ModelPackage(made, listed.manifest).verify():
            raise PackageError(f"{path} is damaged: {altered[0]} for {target} was changed.")
    try:
        return ModelPackage.open(out)
    except PackageError:
        shutil.rmtree(out)
        raise


def _check(packages: Sequence[ModelPackage]) -> None:
    if len(packages) < 2:
        raise UsageError("a model package takes two packages at least, for different targets.")
    targets = [package.target for package in packages]
    for package in packages:
        get_target(package.target)  # one that we know
        if targets.count(package.target) > 1:
            raise UsageError(f"two packages are for {package.target}: give one for each target.")
        if _source(package) != _source(packages[0]):
            raise UsageError(
                f"{package.path} and {packages[0].path} were made from different checkpoints: "
                "export them from the same one."
            )
        if altered := package.verify():
            raise PackageError(f"{package.path} is damaged: {altered[0]} has changed.")


def _source(package: ModelPackage) -> tuple[Any, ...]:
    """Return what is the same in all packages made from one checkpoint, or a copy of it."""
    source = package.manifest["source"]
    files = source.get("files")
    files = files if isinstance(files, dict) else {}
    sizes = {name: str(facts).partition(",")[0] for name, facts in files.items()}
    tokenizer = package.files.get("tokenizer.json", {}).get("sha256")
    about = tuple(source.get(key) for key in ("name", "format", "commit", "adapters", "hashes"))
    return (*about, sizes, tokenizer)


def _add(package: ModelPackage, folder: Path, stored: BinaryIO, known: dict[bytes, int]) -> None:
    """Copy `package` to `folder`, and its weights to the end of `stored` where they are new."""
    folder.mkdir(parents=True)
    _copy_small(package, folder)
    graph = package.model_path.read_bytes()
    places: dict[str, int] = {}
    with package.data_path.open("rb") as data:
        for weights in _weights(graph, package.model_path):
            digest = _digest(data, weights)
            if digest not in known:
                known[digest] = _append(data, weights, stored)
            places[weights.name] = known[digest]
    (folder / SHARED_GRAPH).write_bytes(_moved(graph, places))


def _copy_small(package: ModelPackage, folder: Path) -> None:
    """Copy all files of `package` but its weights, manifest and our signature included."""
    ours, _ = signature_files(package.index)
    for name in (*package.files, MANIFEST, ours.name):
        if name == DATA_FILE:
            continue
        source = file_inside(package.path, name, PackageError)
        if source is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)


def _weights(graph: bytes, file: Path) -> list[Weights]:
    try:
        return read_model(graph, DATA_FILE).weights
    except (GraphError, WireError) as problem:
        raise PackageError(f"{file} {problem}.") from None


def _digest(data: BinaryIO, weights: Weights) -> bytes:
    digest = hashlib.sha256()
    data.seek(weights.start)
    left = weights.end - weights.start
    while left:
        part = data.read(min(_CHUNK, left))
        digest.update(part)
        left -= len(part)
    return digest.digest()


def _append(data: BinaryIO, weights: Weights, stored: BinaryIO) -> int:
    start = next_offset(stored.tell(), weights.end - weights.start)
    stored.write(bytes(start - stored.tell()))
    _copy_range(data, weights.start, weights.end - weights.start, stored)
    return start


def _copy_range(data: BinaryIO, start: int, length: int, to: BinaryIO) -> None:
    data.seek(start)
    while length:
        part = data.read(min(_CHUNK, length))
        if not part:
            raise PackageError(f"{data.name} is damaged: it is too short.")
        to.write(part)
        length -= len(part)


def _moved(model: bytes, places: Mapping[str, int]) -> bytes:
    """Return the ONNX file `model` with other offsets of its weights, by name."""

    def within(message: Any, number: int, change: Any) -> bytes:
        return b"".join(
            encode(n, kind, change(value) if n == number else value)
            for n, kind, value in fields(message)
        )

    def tensor(message: Any) -> bytes:
        names = [bytes(value).decode() for n, _, value in fields(message) if n == 8]
        place = places.get(names[0]) if names else None
        return bytes(message) if place is None else within(message, 13, lambda e: entry(e, place))

    def entry(message: Any, place: int) -> bytes:
        key = next(bytes(value) for n, _, value in fields(message) if n == 1)
        if key != b"offset":
            return bytes(message)
        return encode(1, BYTES, key) + encode(2, BYTES, str(place).encode())

    return within(memoryview(model), 7, lambda graph: within(graph, 5, tensor))


def _restore(folder: Path, data: Path, package: ModelPackage, out: Path) -> None:
    """Write the data file that `package` lists, from the weights in `data`."""
    at = {
        weights.name: weights
        for weights in _weights(
            read_inside(folder, SHARED_GRAPH, PackageError, max_bytes=_MAX_GRAPH),
            folder / SHARED_GRAPH,
        )
    }
    graph = read_inside(folder, MODEL_FILE, PackageError, max_bytes=_MAX_GRAPH)
    size = package.files.get(DATA_FILE, {}).get("size", 0)
    wanted = list(_weights(graph, folder / MODEL_FILE))
    # Weights that are the same are stored once; a claim far beyond that would fill the disk.
    most = _MOST_REPEATED * data.stat().st_size + _CHUNK
    if max(size, sum(weights.end - weights.start for weights in wanted)) > most:
        raise PackageError(f"{folder} is damaged: its weights exceed those of the model package.")
    with data.open("rb") as stored, out.open("xb") as file:
        for weights in wanted:
            there, length = at.get(weights.name), weights.end - weights.start
            if there is None or there.end - there.start != length or weights.end > size:
                raise PackageError(f"{folder} is damaged: its graphs differ in {weights.name!r}.")
            file.seek(weights.start)
            _copy_range(stored, there.start, length, file)
        file.truncate(size)


def _asset_uri(file: Path) -> str:
    """Return the address that ONNX Runtime gives a folder that contains `file` alone."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while part := data.read(_CHUNK):
            digest.update(part)
    lines = f"{digest.hexdigest()}  {file.name}\n"
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def _component(packages: Sequence[ModelPackage], uri: str) -> dict[str, Any]:
    folder_option = "session.model_external_initializers_file_folder_path"
    variants = {}
    for package in packages:
        executor = {"model_file": SHARED_GRAPH, "session_options": {folder_option: uri}}
        variants[package.target] = {
            "ep": get_target(package.target).session.provider.ort_name,
            "executor_info": {"ort": executor},
        }
    return {"component_name": COMPONENT, "variants": variants}


def _variant(path: Path, target: str) -> Mapping[str, Any]:
    component = read_package_json(path / COMPONENT, "component.json", max_bytes=_MAX_JSON)
    variants = component.get("variants") if component else None
    if not isinstance(variants, dict):
        if (path / MODEL_FILE).is_file():
            raise PackageError(f"{path} is a package for one target already: use it as it is.")
        raise PackageError(
            f"{path} is not a model package of llama-onnx: `model-package make` makes one."
        )
    if not (is_plain_name(target) and isinstance(variants.get(target), dict)):
        raise UsageError(f"{path} has no package for {target}: it has {', '.join(variants)}.")
    variant: Mapping[str, Any] = variants[target]
    return variant


def _data_file(path: Path, variant: Mapping[str, Any], target: str) -> Path:
    try:
        executor = variant["executor_info"]["ort"]
        (uri,) = executor["session_options"].values()
        name = str(uri).replace(":", "-")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PackageError(
            f"{path} is damaged: it does not say where {target}'s weights are."
        ) from None
    with open_inside(path, f"{_ASSETS}/{name}/{DATA_FILE}", PackageError):
        return path / _ASSETS / name / DATA_FILE


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_bytes((json.dumps(content, indent=2) + "\n").encode())
