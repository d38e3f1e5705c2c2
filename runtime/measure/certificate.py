"""The certificate in a package: reference logits, to check the package against on any machine.

`parity/certificate.json` has the measurements made with the package, the thresholds, and the hashes
of the files it covers; `parity/reference.safetensors` has the reference's logits, cut down
to the likeliest tokens. docs/parity.md describes the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_onnx.runtime.measure.metrics import NO_TARGET, Ids, TopK
from llama_onnx.runtime.measure.situations import Passage
from llama_onnx.runtime.measure.thresholds import Threshold
from llama_onnx.targets.errors import PackageError, describe_damage
from llama_onnx.targets.folder_files import file_inside, read_inside
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage
from llama_onnx.targets.package_json import read_package_json

FORMAT_VERSION = 1
FOLDER = "parity"
CERTIFICATE, REFERENCE = "certificate.json", "reference.safetensors"
MAX_BYTES = 2_000_000
"""The most bytes that both files may take together."""

_MOST_PASSAGES, _LONGEST_PASSAGE, _LONGEST_TEXT = 64, 4096, 8192
"""Far more than `certify` writes, and few enough to replay: four of up to 34 tokens."""

COVERED_FILES = (MODEL_FILE, DATA_FILE, "tokenizer.json", "genai_config.json")
"""The files that a certificate covers, if the package has them."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class FullRows:
    """All logits [n, V] of the package's weights at `positions` [n] of passage number `passage`."""

    passage: int
    positions: Ids
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Certificate:
    """What a package is checked against.

    `package` and `original` are the reference's logits at every position of every passage, with the
    package's weights and with the original weights. `full` has complete rows at some positions,
    with the package's weights.
    `content` is certificate.json: precision, activations, measurements, versions, hashes,
    thresholds.
    """

    content: Mapping[str, Any]
    texts: tuple[str | None, ...]
    passages: tuple[Passage, ...]
    package: tuple[TopK, ...]
    original: tuple[TopK, ...]
    full: tuple[FullRows, ...]

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        """The thresholds for all kinds of packages and providers; select with `applies`."""
        return tuple(Threshold.from_row(row) for row in self.content["thresholds"])


def next_tokens(passage: Passage) -> Ids:
    """Return the next token [N] at each position of the prompt, and `NO_TARGET` after it.

    The tokens after the prompt were generated, so they are not a text to predict.
    """
    targets = np.full(len(passage.ids), NO_TARGET)
    targets[: passage.prompt - 1] = passage.ids[1 : passage.prompt]
    return targets


def to_arrays(certificate: Certificate) -> Arrays:
    """Return the arrays of reference.safetensors, by name."""
    arrays: Arrays = {}
    for index, passage in enumerate(certificate.passages):
        arrays[f"{index}.ids"] = passage.ids.astype(np.int32)
        for side in ("package", "original"):
            kept: TopK = getattr(certificate, side)[index]
            arrays[f"{index}.{side}.ids"] = kept.ids
            arrays[f"{index}.{side}.logits"] = kept.logits
            arrays[f"{index}.{side}.logsumexp"] = kept.logsumexp
            arrays[f"{index}.{side}.next"] = kept.target_logits
    for rows in certificate.full:
        arrays[f"{rows.passage}.full.positions"] = rows.positions.astype(np.int32)
        arrays[f"{rows.passage}.full.logits"] = rows.logits
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def read_certificate(package: Path) -> Certificate:
    """Read the certificate in `package`; raise `PackageError` if missing, damaged or too new."""
    folder = package / FOLDER
    content = _read_content(package, f"{FOLDER}/{CERTIFICATE}")
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise PackageError(
            f"{folder / CERTIFICATE} has format {version}, but this llama-onnx reads up to format "
            f"{FORMAT_VERSION}: upgrade llama-onnx."
        )
    try:
        arrays = _read_arrays(package, f"{FOLDER}/{REFERENCE}", content["reference"]["sha256"])
        return _parse(content, arrays)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PackageError(
            f"{folder / CERTIFICATE} is damaged: {describe_damage(error)}."
        ) from None


def stale_files(certificate: Certificate, package: ModelPackage) -> list[str]:
    """Return the files of `package` that differ from those the certificate was made for."""
    return [
        name
        for name, sha256 in certificate.content["files"].items()
        if package.manifest["files"].get(name, {}).get("sha256") != sha256
    ]


def _read_content(package: Path, name: str) -> dict[str, Any]:
    content = read_package_json(package, name, max_bytes=MAX_BYTES)
    if content is None:
        raise PackageError(
            f"{package} has no certificate: make one with `llama-onnx validate --certify`, or "
            "export the package with --prove; `verify --files-only` needs none."
        )
    return content


def _read_arrays(package: Path, name: str, sha256: Any) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    there = file_inside(package, name, PackageError)
    data = read_inside(package, name, PackageError, max_bytes=MAX_BYTES) if there else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise PackageError(
            f"{package / name} is missing, or is not the file that the certificate lists."
        )
    try:
        return load(data)
    except SafetensorError as error:
        raise PackageError(f"{package / name} is damaged: {error}.") from None


def _parse(content: Mapping[str, Any], arrays: Arrays) -> Certificate:
    entries: Sequence[Mapping[str, Any]] = content["passages"]
    _check_entries(content, entries)
    indices = range(len(entries))
    certificate = Certificate(
        content=content,
        texts=tuple(entry["text"] for entry in entries),
        passages=tuple(
            Passage(arrays[f"{i}.ids"].astype(np.int64), int(entries[i]["prompt"])) for i in indices
        ),
        package=tuple(_kept(arrays, f"{i}.package") for i in indices),
        original=tuple(_kept(arrays, f"{i}.original") for i in indices),
        full=tuple(
            FullRows(i, arrays[f"{i}.full.positions"].astype(np.int64), arrays[f"{i}.full.logits"])
            for i in indices
            if f"{i}.full.positions" in arrays
        ),
    )
    _check_sizes(certificate, content["vocab_size"])
    _check_numbers(certificate)
    _ = certificate.thresholds
    return certificate


def _check_entries(content: Mapping[str, Any], entries: Any) -> None:
    """Raise `TypeError` or `ValueError` unless everything else is of the right type and size."""
    wanted = {"vocab_size": int, "precision": str, "activations": str, "thresholds": list}
    for key, kind in {**wanted, "files": dict, "passages": list}.items():
        if type(content[key]) is not kind:
            raise TypeError(key)
    if not 0 < len(entries) <= _MOST_PASSAGES:
        raise ValueError("the number of passages")
    for entry in entries:
        text, prompt = entry["text"], entry["prompt"]
        if type(prompt) is not int or not (text is None or isinstance(text, str)):
            raise TypeError("a passage")
        if text is not None and len(text) > _LONGEST_TEXT:
            raise ValueError("a text")


def _check_numbers(certificate: Certificate) -> None:
    """Raise `ValueError` for NaN and infinity, which no limit holds for, or every one."""
    for passage, *sides in zip(
        certificate.passages, certificate.package, certificate.original, strict=True
    ):
        known = next_tokens(passage) != NO_TARGET
        for kept in sides:
            values = (kept.logits, kept.logsumexp, kept.target_logits[known])
            if not all(v.dtype.kind == "f" and np.isfinite(v).all() for v in values):
                raise ValueError("a number that is not finite")
    if not all(np.isfinite(rows.logits).all() for rows in certificate.full):
        raise ValueError("a number that is not finite")


def _kept(arrays: Arrays, prefix: str) -> TopK:
    return TopK(
        arrays[f"{prefix}.ids"],
        arrays[f"{prefix}.logits"],
        arrays[f"{prefix}.logsumexp"],
        arrays[f"{prefix}.next"],
    )


def _check_sizes(certificate: Certificate, vocab_size: int) -> None:
    """Raise `ValueError` unless all arrays have equal lengths and all ids are in the vocabulary."""
    for passage, *sides in zip(
        certificate.passages, certificate.package, certificate.original, strict=True
    ):
        length = len(passage.ids)
        if passage.ids.ndim != 1 or not 0 < passage.prompt < length <= _LONGEST_PASSAGE:
            raise ValueError("a passage")
        if passage.ids.min() < 0 or passage.ids.max() >= vocab_size:
            raise ValueError("a passage")
        for kept in sides:
            shapes = {kept.ids.shape, kept.logits.shape, (length, kept.ids.shape[1])}
            if len(shapes) > 1 or {kept.logsumexp.shape, kept.target_logits.shape} != {(length,)}:
                raise ValueError("an array of another length")
            if kept.ids.min() < 0 or kept.ids.max() >= vocab_size:
                raise ValueError("a token outside the vocabulary")
    for rows in certificate.full:
        length = len(certificate.passages[rows.passage].ids)
        if rows.logits.shape != (len(rows.positions), vocab_size):
            raise ValueError("logits of another size")
        if rows.positions.min() < 0 or rows.positions.max() >= length:
            raise ValueError("a position outside the passage")
