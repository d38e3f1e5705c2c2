"""What the safetensors library refuses is refused, and what both accept has the same values."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from llama_onnx.exporter.formats.safetensors import stored_tensors
from llama_onnx.targets.errors import CheckpointError

FIRST = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
SECOND = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}
DATA = bytes(range(32))
HUGE = 2**63


def written(path: Path, header: Any, data: bytes = DATA, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def read_by_library(path: Path) -> dict[str, np.ndarray] | None:
    """Return what the library reads; None if it refuses the file."""
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def read_by_us(path: Path) -> dict[str, np.ndarray] | None:
    try:
        return {
            name: tensor.read()
            for name, tensor in stored_tensors(path).items()
            if tensor.dtype is not None and tensor.shape
        }
    except CheckpointError as error:
        assert str(error).count(". ") == 0 and str(error).endswith(".")
        return None


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**FIRST, **changes}, "b": SECOND}


REFUSED: dict[str, Any] = {
    "negative begin": entry(data_offsets=[-8, 24]),
    "negative end": entry(data_offsets=[0, -1]),
    "reversed": entry(data_offsets=[24, 0]),
    "beyond the end": entry(data_offsets=[0, 10**9]),
    "beyond 64 bits": entry(data_offsets=[0, 2**64]),
    "overlap": {"a": FIRST, "b": {**SECOND, "data_offsets": [16, 24]}},
    "same place": {"a": FIRST, "b": FIRST},
    "hole": {"a": FIRST, "b": {"dtype": "F16", "shape": [2], "data_offsets": [28, 32]}},
    "bytes at the end": {"a": FIRST},
    "three offsets": entry(data_offsets=[0, 24, 24]),
    "offsets as text": entry(data_offsets=["0", "24"]),
    "offsets as floats": entry(data_offsets=[0.0, 24.0]),
    "offsets as booleans": entry(data_offsets=[False, 24]),
    "minus zero": json.dumps(entry()).replace("[0,", "[-0,").encode(),
    "negative shape": entry(shape=[-2, -3]),
    "shape too large": entry(shape=[HUGE, HUGE]),
    "shape wraps to its size": entry(shape=[2**62 + 3, 2, 2]),
    "shape too large, then none": entry(shape=[HUGE, HUGE, 0], data_offsets=[0, 0]),
    "shape as booleans": entry(shape=[True, 6]),
    "shape as text": entry(shape="23"),
    "shape of another size": entry(shape=[2, 2]),
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 24]}, "b": SECOND},
    "unknown type": entry(dtype="F128"),
    "type as number": entry(dtype=32),
    "not an entry": {"a": None, "b": SECOND},
    "metadata of numbers": {"__metadata__": {"format": 1}, **entry()},
    "metadata as text": {"__metadata__": "pt", **entry()},
    "a list": b"[]",
    "nothing": b"",
    "UTF-16": json.dumps(entry()).encode("utf-16"),
    "UTF-16 without a mark": json.dumps(entry()).encode("utf-16-le"),
    "UTF-32": json.dumps(entry()).encode("utf-32"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(entry()).encode(),
    "not UTF-8": json.dumps(entry()).encode().replace(b'"a"', b'"\xff"'),
    "half a surrogate pair": json.dumps(entry()).replace('"a"', '"\\ud800"').encode(),
    "NaN": json.dumps(entry()).replace("24", "NaN").encode(),
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a second value": json.dumps(entry()).encode() + b"{}",
    "control character": json.dumps(entry()).encode().replace(b'"a"', b'"a\x01"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_library_refuses_is_refused(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", REFUSED[name])
    assert read_by_library(path) is None
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        stored_tensors(path)


@pytest.mark.parametrize("length", [0, 1, HUGE, 2**64 - 1, 10**8 + 1, 10_000])
def test_a_wrong_length_of_the_header_is_refused(length: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", entry(), length=length)
    assert read_by_library(path) is None
    assert read_by_us(path) is None


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + json.dumps(FIRST).encode() + b"," + json.dumps(entry()).encode()[1:],
        json.dumps(entry(more=1)).encode(),
        b" " + json.dumps(entry()).encode(),
        json.dumps({"x" * 1000: FIRST, "b": SECOND}).encode(),
        json.dumps({"esc\x1b]0;title\x07": FIRST, "b": SECOND}).encode(),
    ],
    ids=["name twice", "unknown field", "leading space", "long name", "escape"],
)
def test_what_only_the_library_accepts(header: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", header)
    assert read_by_library(path) is not None
    assert read_by_us(path) is None


@pytest.mark.parametrize("seed", range(20))
def test_what_is_accepted_has_the_values_that_the_library_reads(seed: int, tmp_path: Path) -> None:
    rng, path, accepted = random.Random(seed), tmp_path / "x.safetensors", 0
    for _ in range(60):
        header, data = _mutated(rng)
        written(path, header, data)
        ours, theirs = read_by_us(path), read_by_library(path)
        if ours is None:
            continue
        accepted += 1
        assert theirs is not None, header
        for name, values in ours.items():
            assert values.shape == theirs[name].shape
            assert values.tobytes() == theirs[name].tobytes()
    assert accepted  # some mutations do no harm


def _mutated(rng: random.Random) -> tuple[bytes, bytes]:
    """Return a valid header, its entries in any order, and in most cases changed, and the data."""
    codes = {"F32": 4, "F16": 2, "F64": 8, "U8": 1, "I64": 8, "BOOL": 1}
    header: dict[str, Any] = {}
    end = 0
    for number in range(rng.randint(0, 4)):
        code, shape = rng.choice(list(codes)), [rng.randint(0, 4) for _ in range(rng.randint(0, 3))]
        size = codes[code] * int(np.prod(shape, dtype=int))
        offsets = [end, end + size]
        header[f"t{number}"] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        end += size
    names = list(header)
    rng.shuffle(names)
    header = {name: header[name] for name in names}
    values: tuple[Any, ...] = (-1, 0, 1, 8, 2**31, HUGE, 2**64, 1.0, True, None, "1", "I8", [], {})
    for _ in range(rng.choice((0, 1, 1, 2))):
        if header:
            changed = header[rng.choice(names)]
            key = rng.choice(list(changed))
            if isinstance(changed[key], list) and changed[key] and rng.random() < 0.8:
                changed[key][rng.randrange(len(changed[key]))] = rng.choice(values)
            else:
                changed[key] = rng.choice(values)
    text = bytearray(json.dumps(header).encode() + b" " * rng.randint(0, 3))
    if rng.random() < 0.2:
        text[rng.randrange(len(text))] = rng.randrange(256)
    data = bytes(rng.randrange(2) for _ in range(max(0, end + rng.choice((0, 0, 0, 0, -1, 1)))))
    return bytes(text), data
