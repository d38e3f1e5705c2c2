"""Codes that a calibration chose, on disk until the package is written: one file for each layer.

Files appear whole or not at all, and the hidden states after the last layer are beside them, so a
calibration that was killed continues with the layer after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from llama_onnx.exporter.formats.safetensors import stored_tensors
from llama_onnx.exporter.formats.tensor import Float32, StoredTensor
from llama_onnx.exporter.model.channel_scales import ChannelScales, Exponents
from llama_onnx.exporter.model.storage import Blocks, Quantized, pack, unpack
from llama_onnx.targets.durable import replace_file
from llama_onnx.targets.strict_json import JSONError, parse_json

_STATE, _HIDDEN = "state.json", "hidden-{}.safetensors"
_CODES, _SCALES, _ZEROS = "codes", "scales", "zero_points"
_EXPONENTS = "exponents"


@dataclass(frozen=True)
class Stage:
    """What a calibration found for one layer, or for the head: matrices by tensor name, with the
    storage of each, and exponents of channel scales by module."""

    name: str
    matrices: Mapping[str, tuple[Quantized, Blocks]]
    exponents: Mapping[str, Exponents]


@dataclass(frozen=True)
class Calibrated:
    """The codes of a finished calibration, by tensor name, and its channel scales."""

    codes: Mapping[str, Mapping[str, StoredTensor]]
    scales: ChannelScales

    def has(self, names: Sequence[str]) -> bool:
        """Return whether there are codes for all of `names`."""
        return all(name in self.codes for name in names)

    def rows(self, name: str, start: int, stop: int, storage: Blocks) -> Quantized:
        """Return rows [start, stop) of tensor `name`, quantized for `storage`."""
        parts = self.codes[name]
        codes, scales = (parts[part].values(start, stop) for part in (_CODES, _SCALES))
        zeros = parts[_ZEROS].values(start, stop) if _ZEROS in parts else None
        width = scales.shape[1] * storage.block_size
        return Quantized(unpack(codes, storage.bits)[:, :width], scales, zeros)


class Store:
    """The folder of a calibration; `finished` are the names of its complete stages, in order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._hashes = _read_state(folder)

    @property
    def finished(self) -> Sequence[str]:
        """The names of the stages that are complete."""
        return tuple(self._hashes)

    def put(self, stage: Stage, hidden: Sequence[Float32]) -> None:
        """Keep `stage`, and the `hidden` states [S, H] after it."""
        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, (found, storage) in stage.matrices.items():
            tensors[f"{name}:{_CODES}"] = pack(found.codes, storage.bits)
            tensors[f"{name}:{_SCALES}"] = found.scales.astype(np.float32)
            if found.zero_points is not None:
                tensors[f"{name}:{_ZEROS}"] = found.zero_points
        for name, exponents in stage.exponents.items():
            tensors[f"{name}:{_EXPONENTS}"] = exponents
        states = {f"{index:06d}": state for index, state in enumerate(hidden)}
        hidden_hash = self._write(_HIDDEN.format(len(self._hashes)), states)
        codes_hash = self._write(f"{stage.name}.safetensors", tensors)
        self._hashes[stage.name] = (codes_hash, hidden_hash)
        replace_file(self.folder / _STATE, json.dumps(self._hashes).encode())
        (self.folder / _HIDDEN.format(len(self._hashes) - 2)).unlink(missing_ok=True)

    def hidden(self) -> list[Float32]:
        """Return the hidden states [S, H] after the last complete stage."""
        file = self.folder / _HIDDEN.format(len(self._hashes) - 1)
        stored = stored_tensors(file)
        return [stored[name].read() for name in sorted(stored)]

    def result(self) -> Calibrated:
        """Return the codes and scales of all complete stages."""
        codes: dict[str, dict[str, StoredTensor]] = {}
        exponents: dict[str, Exponents] = {}
        for stage in self._hashes:
            for key, stored in stored_tensors(self.folder / f"{stage}.safetensors").items():
                name, _, part = key.rpartition(":")
                if part == _EXPONENTS:
                    exponents[name] = stored.read()
                else:
                    codes.setdefault(name, {})[part] = stored
        return Calibrated(codes, ChannelScales(exponents))

    def _write(self, name: str, tensors: dict[str, npt.NDArray[Any]]) -> str:
        content = save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
        replace_file(self.folder / name, content)
        return hashlib.sha256(content).hexdigest()


def _read_state(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the hashes of the complete stages whose files are intact."""
    try:
        listed = parse_json((folder / _STATE).read_bytes())
    except (OSError, JSONError):
        return {}
    found: dict[str, tuple[str, str]] = {}
    for name, hashes in _entries(listed):
        if _sha256(folder / f"{name}.safetensors") != hashes[0]:
            break
        found[name] = hashes
    # The hidden states of earlier stages are gone: the last ones must be those of the last stage.
    while found:
        last = list(found)[-1]
        if _sha256(folder / _HIDDEN.format(len(found) - 1)) == found[last][1]:
            return found
        del found[last]
    return {}


def _entries(listed: Any) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, hashes in listed.items() if isinstance(listed, dict) else ():
        if isinstance(hashes, list) and [type(part) for part in hashes] == [str, str]:
            yield name, (hashes[0], hashes[1])


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
