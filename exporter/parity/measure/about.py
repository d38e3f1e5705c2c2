"""Facts about what was measured: the package's files and parts, library versions, the processor."""

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
from llama_onnx.exporter.reference.subject import Subject
from llama_onnx.runtime.measure.certificate import FOLDER
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOOLS = ("llama-onnx", "onnxruntime", "torch", "transformers", "onnx", "tokenizers", "numpy")

# The first of these that occurs in an initializer's name decides its part.
_WEIGHTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "self_attn": "attention",
    "mlp": "MLP",
}


@dataclass(frozen=True)
class File:
    """A file of the package. `as_made` is whether it has the hash in the manifest, None if
    the manifest does not name it."""

    name: str
    size: int
    sha256: str
    as_made: bool | None


@dataclass(frozen=True)
class About:
    """The package's `files`, and those `missing` that its manifest names.

    `parts` has the bytes of the whole folder by purpose, `bits_per_weight` the data file's bits
    over the number of parameters, `pieces` the texts of the tokens that a report names.
    """

    files: tuple[File, ...]
    missing: tuple[str, ...]
    parts: Mapping[str, int]
    bits_per_weight: float
    versions: Mapping[str, str]
    machine: str
    pieces: Mapping[int, str]

    @property
    def altered(self) -> tuple[str, ...]:
        """Files that are missing, or have another hash than the manifest gives them."""
        return (*(file.name for file in self.files if file.as_made is False), *self.missing)


def describe(subject: Subject, tokens: Iterable[int]) -> About:
    """Describe the package of `subject` and this machine; `tokens` are those that a report names.

    Reads each file of the package once, for its hash.
    """
    files = tuple(_files(subject))
    data = next((file.size for file in files if file.name == DATA_FILE), 0)
    return About(
        files=files,
        missing=tuple(sorted(set(subject.manifest.get("files", {})) - {f.name for f in files})),
        parts=_parts(subject.path, files),
        bits_per_weight=8 * data / subject.original.config.num_parameters(),
        versions=dict(_versions()),
        machine=machine(),
        pieces=_pieces(subject.path, tokens),
    )


def machine() -> str:
    """Return the processor's name, its number of threads, and the operating system."""
    return f"{_processor()}, {os.cpu_count()} threads, {platform.system()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux, where platform.processor() is mostly empty
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


@cache  # reading a package's metadata takes milliseconds, and it does not change meanwhile
def _versions() -> Mapping[str, str]:
    return {"Python": platform.python_version(), **{name: _version(name) for name in TOOLS}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout, or another flavor of the wheel
        return "not installed as a package"


def _files(subject: Subject) -> Iterable[File]:
    recorded = subject.manifest.get("files", {})
    for path in sorted(path for path in subject.path.rglob("*") if path.is_file()):
        name, digest = path.relative_to(subject.path).as_posix(), hash_file(path)
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
    """Yield name and bytes of each tensor in the data file; of tensors that share bytes, only the
    first."""
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
    """Return a token's text; for a part of a character, its spelling in the vocabulary."""
    piece: str | None = tokenizer.id_to_token(token)
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    if piece is None or not text or "\ufffd" in text:
        return piece
    # SentencePiece's decoder removes the space before a text.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
