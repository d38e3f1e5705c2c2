"""Small files that promise much: each must be refused before what it promises is allocated.

`python -m tests.support.bombs FOLDER` writes each into FOLDER, reads it, and prints as JSON what
became of it and the largest size of the process.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_NOTHING = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
_EMPTY = pickle.dumps({}, 2)


def torch_zip(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of records, as torch.save lays them out."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return packed.getvalue()


def pickled(steps: bytes, storage: bytes = b"\0" * 64) -> bytes:
    """Return a file of torch.save whose pickle has these steps."""
    return torch_zip({"data.pkl": b"\x80\x02" + steps + b".", "data/0": storage})


def tensor(shape: bytes, strides: bytes, count: bytes = b"K\x10", offset: bytes = b"K\0") -> bytes:
    """Return the steps that make {"w": a float tensor}; all arguments are steps that make ints."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu" + count + b"tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset
    made += b"(" + shape + b"t(" + strides + b"t\x89ccollections\nOrderedDict\n)Rt"
    return b"}X\1\0\0\0w" + made + b"Rs"


def _long(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


HUGE = _long(2**62)

PICKLES: dict[str, bytes] = {
    "bytearray of 4e9": b"}X\1\0\0\0wc__builtin__\nbytearray\n" + _long(4 * 10**9) + b"\x85Rs",
    "bytes of 2**63": b"}X\1\0\0\0wc__builtin__\nbytes\n" + HUGE + b"\x85Rs",
    "numpy array of 1e12": b"}X\1\0\0\0wcnumpy\nzeros\n" + _long(10**12) + b"\x85Rs",
    "memo index 2**32 - 1": b"}r\xff\xff\xff\xff",
    "memo index 2**63 as text": b"}p9223372036854775808\n",
    "text of 4 GiB": b"}X\xff\xff\xff\xff",
    "text of 2**64": b"}\x8d" + b"\xff" * 8,
    "bytes of 2**64": b"}\x8e" + b"\xff" * 8,
    "bytearray of 2**64": b"}\x96" + b"\xff" * 8,
    "frame of 2**64": b"\x95" + b"\xff" * 8 + b"}",
    "int of 2 GiB": b"}\x8b\xff\xff\xff\x7f",
    "int of a million digits": b"}I" + b"9" * 1_000_000 + b"\n",
    "long of a million digits": b"}L" + b"9" * 1_000_000 + b"L\n",
    "tuples doubled 90,000 times": b")" + b"q\0h\0h\0\x86" * 90_000,
    "tuples doubled, as a key": b"}" + b")" + b"q\0h\0h\0\x86" * 60 + b"Ns",
    "tuples nested 300,000 times": b")" + b"\x85" * 300_000,
    "300,000 marks": b"(" * 300_000,
    "five million steps": b"}" + b"N" * 5_000_000,
    "shape of 2**124 elements": tensor(HUGE * 2, b"K\1K\1"),
    "storage of 2**62": tensor(b"K\2", b"K\1", count=HUGE),
    "offset of 2**62": tensor(b"K\2", b"K\1", offset=HUGE),
    "strides of 2**62": tensor(b"K\2K\2", HUGE * 2),
    "negative shape": tensor(_long(-4), b"K\1"),
    "negative stride": tensor(b"K\4", _long(-1)),
    "negative offset": tensor(b"K\4", b"K\1", offset=_long(-4)),
    "expanded to 2**62 rows": tensor(HUGE + b"K\4", b"K\0K\1"),
    "40 dimensions": tensor(b"K\1" * 40, b"K\1" * 40),
    "a million dimensions": tensor(b"K\1" * 200_000, b"K\1" * 200_000),
    "fewer strides": tensor(b"K\2K\2", b"K\1"),
    "boolean shape": tensor(b"\x88", b"K\1"),
    "text shape": tensor(b"X\1\0\0\0" + b"4", b"K\1"),
}


def _zips() -> Iterator[tuple[str, bytes]]:
    plain = torch_zip({"data.pkl": _EMPTY, "byteorder": b"little"})
    zeros = b"\0" * (64 << 20)
    order = torch_zip({"data.pkl": _EMPTY, "byteorder": zeros}, zipfile.ZIP_DEFLATED)
    yield "deflated byteorder", order
    yield (
        "deflated byteorder of 4 GiB",
        order.replace(struct.pack("<I", len(zeros)), struct.pack("<I", 0xFFFFFFFE)),
    )
    yield "deflated pickle", torch_zip({"data.pkl": zeros}, zipfile.ZIP_DEFLATED)
    end = plain.rindex(b"PK\5\6")
    for name, size, start in (
        ("directory of 4 GiB", 0xFFFFFFFE, 0),
        ("directory beyond the end", 0x1000, 0xFFFFFF00),
    ):
        yield name, plain[: end + 12] + struct.pack("<II", size, start) + plain[end + 20 :]
    wide = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 2**63, 2**63, 2**62, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    yield "zip64 directory of 2**62", plain[:end] + wide + locator + plain[end:]
    first = plain.index(b"PK\1\2")
    for name, at, value in (
        ("record of 4 GiB", 20, struct.pack("<II", 0xFFFFFFFE, 0xFFFFFFFE)),
        ("record beyond the end", 42, struct.pack("<I", 0x7FFFFFFF)),
        ("record with a zip64 size and no field", 20, b"\xff" * 8),
    ):
        yield name, plain[: first + at] + value + plain[first + at + len(value) :]
    second = plain.index(b"PK\1\2", first + 4)
    overlap = plain[: second + 42] + b"\0\0\0\0" + plain[second + 46 :]
    yield "records that overlap", overlap
    twice = torch_zip({"data.pkl": _EMPTY, "data.pkk": _EMPTY}).replace(b"data.pkk", b"data.pkl")
    yield "two pickles of one name", twice
    yield "200,000 records", torch_zip({f"{n}": b"" for n in range(200_000)})


def gguf(keys: bytes, num_keys: int = 1, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    """Return a GGUF file with this metadata and these tensors."""
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + keys + tensors


def key(name: str, kind: int, value: bytes) -> bytes:
    """Return one entry of GGUF's metadata."""
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def info(*dims: int, kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    """Return one tensor's entry."""
    start = struct.pack("<Q", 1) + b"w" + struct.pack("<I", len(dims) if count is None else count)
    return start + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


HOLES = {
    "list of 250 million bytes": 250_000_000,
    "list of 30 million empty texts": 240_000_000,
    "text of 240 MB": 240_000_000,
}
"""Zeros to add at the end, which take no disk."""

GGUFS: dict[str, Callable[[], bytes]] = {
    "list of 250 million bytes": lambda: gguf(key("a", 9, struct.pack("<IQ", 0, 250_000_000))),
    "list of 30 million empty texts": lambda: gguf(key("a", 9, struct.pack("<IQ", 8, 30_000_000))),
    "many lists of a million": lambda: gguf(
        b"".join(
            key(f"a{n}", 9, struct.pack("<IQ", 0, 1_000_000)) + b"\1" * 1_000_000 for n in range(9)
        ),
        9,
    ),
    "list of 2**62": lambda: gguf(key("a", 9, struct.pack("<IQ", 4, 2**62))),
    "list of lists": lambda: gguf(key("a", 9, struct.pack("<IQIQ", 9, 1, 9, 2**62))),
    "text of 240 MB": lambda: gguf(key("a", 8, struct.pack("<Q", 240_000_000))),
    "text of 2**63": lambda: gguf(key("a", 8, struct.pack("<Q", 2**63))),
    "2**63 keys": lambda: gguf(b"", 2**63),
    "2**63 tensors": lambda: gguf(b"", 0, b"", 2**63),
    "the same key twice": lambda: gguf(key("a", 0, b"\1") * 2, 2),
    "unknown type": lambda: gguf(key("a", 77, b"\1")),
    "alignment 0": lambda: gguf(key("general.alignment", 4, struct.pack("<I", 0))),
    "alignment 2**63": lambda: gguf(
        key("general.alignment", 10, struct.pack("<Q", 2**63)), 1, info(4), 1
    ),
    "2**32 - 1 dimensions": lambda: gguf(b"", 0, info(4, count=2**32 - 1), 1),
    "dimensions that wrap": lambda: gguf(b"", 0, info(2**32, 2**32) + b"\0" * 64, 1),
    "dimension 0": lambda: gguf(b"", 0, info(0, 4) + b"\0" * 64, 1),
    "offset 2**63": lambda: gguf(b"", 0, info(4, offset=2**63) + b"\0" * 64, 1),
    "offset not aligned": lambda: gguf(b"", 0, info(4, offset=1) + b"\0" * 64, 1),
    "unknown tensor type": lambda: gguf(b"", 0, info(4, kind=99) + b"\0" * 64, 1),
}


def _safetensors() -> Iterator[tuple[str, bytes]]:
    for name, header in {
        "header of 30 MB of empty lists": b'{"a":[' + b"[]," * (10 << 20) + b"[]]}",
        "header of 90 MB of empty objects": b'{"a":[' + b"{}," * (30 << 20) + b"{}]}",
        "header of 30 MB of digits": b'{"a":' + b"9" * (30 << 20) + b"}",
        "header of 30 MB of text": b'{"' + b"x" * (30 << 20) + '🎉":1}'.encode(),
        "header of 200,000 tensors": b"{"
        + b",".join(b'"%d":%s' % (n, _NOTHING) for n in range(200_000))
        + b"}",
        "a million brackets": b'{"a":' + b"[" * 1_000_000,
    }.items():
        yield name, struct.pack("<Q", len(header)) + header
    yield "header of 2**63", struct.pack("<Q", 2**63) + b"{}"


def _jsons() -> Iterator[tuple[str, bytes]]:
    valid: dict[str, Any] = {"model_type": "llama"}
    yield "15 MB of empty lists", b'{"a":[' + b"[]," * (5 << 20) + b"[]]}"
    yield "15 MB of text", json.dumps({**valid, "model_type": "🎉" * (1 << 20)}).encode()
    yield "15 million digits", b'{"num_hidden_layers":' + b"9" * (15 << 20) + b"}"
    yield "a million brackets", b"[" * 1_000_000


def _made() -> Iterator[tuple[str, str, bytes]]:
    yield from (("pickle", name, pickled(steps)) for name, steps in PICKLES.items())
    yield from (("zip", name, data) for name, data in _zips())
    yield from (("gguf", name, make()) for name, make in GGUFS.items())
    yield from (("safetensors", name, data) for name, data in _safetensors())
    yield from (("json", name, data) for name, data in _jsons())


def main(folder: Path) -> None:
    """Read every bomb and print what became of it."""
    from llama_onnx.exporter.formats.gguf import read_header
    from llama_onnx.exporter.formats.json import read_json
    from llama_onnx.exporter.formats.safetensors import read_safetensors
    from llama_onnx.exporter.formats.torch_file import read_torch_file
    from llama_onnx.targets.errors import LlamaOnnxError
    from tests.support.peak import peak_memory

    readers: dict[str, Callable[[Path], object]] = {
        "pickle": read_torch_file,
        "zip": read_torch_file,
        "gguf": read_header,
        "safetensors": read_safetensors,
        "json": read_json,
    }
    for kind, name, data in _made():
        path = folder / f"bomb.{kind}"
        path.write_bytes(data)
        os.truncate(path, len(data) + HOLES.get(name, 0))
        size = path.stat().st_size
        del data
        started = time.perf_counter()
        try:
            readers[kind](path)
            outcome = "accepted"
        except LlamaOnnxError as error:
            outcome = str(error)
        except BaseException as error:  # a crash is what is looked for
            outcome = f"CRASH {error!r}"[:300]
        seconds = time.perf_counter() - started
        found = {"kind": kind, "name": name, "outcome": outcome, "seconds": seconds}
        print(json.dumps({**found, "size": size, "bytes": peak_memory()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
