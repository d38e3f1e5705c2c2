"""What was measured, on what: the package's parts and their hashes, versions, the processor."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from llama_onnx.exporter.checkpoints.package.package import load_model
from llama_onnx.runtime.measure.certificate import FOLDER
from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage, hash_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOOLS = ("llama-onnx", "onnxruntime", "torch", "transformers", "onnx", "tokenizers", "numpy")

# The first piece of a name that is found in an initializer's names its part.
_WEIGHTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "self_attn": "attention",
    "mlp": "MLP",
}


@dataclass(frozen=True)
class File:
    """A file of the package. `as_made` is whether it is what the manifest says, None without one
    that names it."""

    name: str
    size: int
    sha256: str
    as_made: bool | None


@dataclass(frozen=True)
class About:
    """`parts` are bytes by what they are for, in the whole folder; `bits_per_weight` are the data
    file's bits over the parameters; `pieces` are the texts of the tokens that a report names."""

    files: tuple[File, ...]
    parts: Mapping[str, int]
    bits_per_weight: float
    versions: Mapping[str, str]
    machine: str
    pieces: Mapping[int, str]


def describe(package: Path, parameters: int, tokens: Iterable[int]) -> About:
    """Everything about `package`, of a model of so many `parameters`, on this machine; `tokens` are
    those a report names. Reads each of the package's files once, for its hash."""
    files = tuple(_files(package))
    data = next((file.size for file in files if file.name == DATA_FILE), 0)
    return About(
        files=files,
        parts=_parts(package, files),
        bits_per_weight=8 * data / parameters,
        versions=dict(_versions()),
        machine=machine(),
        pieces=_pieces(package, tokens),
    )


def machine() -> str:
    """The processor by name, the threads it offers, and the operating system."""
    return f"{_processor()}, {os.cpu_count()} threads, {platform.system()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux, where platform.processor() is mostly empty
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


@cache  # reading a package's metadata takes milliseconds, and none changes while this runs
def _versions() -> Mapping[str, str]:
    return {"Python": platform.python_version(), **{name: _version(name) for name in TOOLS}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout, or another flavour of the wheel
        return "not installed as a package"


def _files(package: Path) -> Iterable[File]:
    try:
        recorded = ModelPackage.open(package).manifest["files"]
    except PackageError:
        recorded = {}
    for path in sorted(path for path in package.rglob("*") if path.is_file()):
        name, digest = path.relative_to(package).as_posix(), hash_file(path)
        made = recorded[name]["sha256"] == digest if name in recorded else None
        yield File(name, path.stat().st_size, digest, made)


def _parts(package: Path, files: tuple[File, ...]) -> dict[str, int]:
    sizes = dict.fromkeys(("embedding", "attention", "MLP", "head", "norms, rotary tables"), 0)
    for name, size in _stored(package):
        part = next((p for key, p in _WEIGHTS.items() if key in name), "norms, rotary tables")
        sizes[part] += size
    for file in files:
        if file.name == DATA_FILE:
            sizes["alignment"] = max(0, file.size - sum(sizes.values()))
    for part in ("graph", "tokenizer", "certificate", "everything else"):
        sizes[part] = sum(f.size for f in files if _kind(f.name) == part)
    return {part: size for part, size in sizes.items() if size}


def _stored(package: Path) -> Iterable[tuple[str, int]]:
    """Name and bytes of each tensor in the data file, of those that share bytes only the first."""
    seen = set()
    for tensor in load_model(package).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and place.get("offset") not in seen:
            seen.add(place.get("offset"))
            yield tensor.name, int(place.get("length", 0))


def _kind(name: str) -> str:
    if name in (MODEL_FILE, DATA_FILE):
        return "graph" if name == MODEL_FILE else "weights"
    if name.startswith(("tokenizer", "chat_template")):
        return "tokenizer"
    return "certificate" if name.startswith(f"{FOLDER}/") else "everything else"


def _pieces(package: Path, tokens: Iterable[int]) -> dict[int, str]:
    if not (package / "tokenizer.json").exists():
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(package / "tokenizer.json"))
    texts = {token: _text(tokenizer, token) for token in tokens}
    return {token: text for token, text in texts.items() if text is not None}


def _text(tokenizer: Tokenizer, token: int) -> str | None:
    """What a token reads as; a part of a character, as the vocabulary writes it."""
    piece: str | None = tokenizer.id_to_token(token)
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    if piece is None or not text or "\ufffd" in text:
        return piece
    # SentencePiece's decoder takes the space in front of a text away.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
