"""A package's graph and weights as transformers.js wants them: parts of the data below 2 GB.

The weights are copied once, in pieces; the graph is rewritten without loading them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage
from llama_onnx.targets.protobuf import BYTES, Value, encode, fields
from llama_onnx.targets.strict_json import MAX_BYTES

LIMIT = 2_000_000_000
"""Most bytes in one data file: browsers cannot hold 2 GB in one buffer."""

MOST_PARTS = 100
"""What transformers.js loads at most."""

_PIECE = 1 << 22


@dataclass(frozen=True)
class Span:
    """The bytes of one weight in the data file."""

    name: str
    start: int
    end: int


def cut(spans: Iterable[Span], size: int, limit: int) -> list[int]:
    """Return where each part of a file of `size` bytes starts: the first at 0, and none in a span.

    Spans may overlap, as tied weights do. Raises `ValueError` with the span that exceeds `limit`.

    >>> cut([Span("a", 0, 4), Span("b", 4, 8), Span("c", 8, 10)], 10, limit=8)
    [0, 8]
    """
    joints, end = {0: "the first weight"}, 0  # where the file may be cut: between weights
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if span.start >= end:
            joints[span.start if end else 0] = span.name
        end = max(end, span.end)
    starts = [0]
    for (joint, name), following in zip(joints.items(), [*joints, size][1:], strict=True):
        if following - joint > limit:
            raise ValueError(name)
        if following - starts[-1] > limit:
            starts.append(joint)
    return starts


def write_graph(package: ModelPackage, folder: Path, name: str, limit: int = LIMIT) -> int:
    """Write `folder`/`name` and its data files NAME_data, NAME_data_1, ...; return their number.

    Raises `PackageError` for a weight larger than `limit` and for files that differ from the
    manifest.
    """
    model = memoryview(read_listed(package, MODEL_FILE))
    size = package.data_path.stat().st_size
    try:
        starts = cut(_spans(model), size, limit)
    except ValueError as error:
        raise PackageError(
            f"{package.path} cannot be cut into files of {limit:,} bytes, because {error} is "
            "larger: export it with a smaller --precision."
        ) from None
    if len(starts) > MOST_PARTS:
        raise PackageError(
            f"{package.path} needs {len(starts)} data files, but transformers.js loads at most "
            f"{MOST_PARTS}: choose a smaller model."
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}_data{f'_{part}' if part else ''}" for part in range(len(starts))]
    (folder / name).write_bytes(_moved(model, _TENSORS, starts, names))
    _copy_parts(package, [folder / part for part in names], [*starts, size])
    return len(names)


def read_listed(package: ModelPackage, name: str) -> bytes:
    """Return the content of a small file of `package`. Raises `PackageError` if it differs from
    the manifest."""
    if name not in package.files or package.files[name]["size"] > MAX_BYTES:
        raise PackageError(f"{package.path} has no {name}, or one that is too large.")
    content = (package.path / name).read_bytes()
    _check_hash(package, name, sha256(content).hexdigest())
    return content


# ---- the graph: field numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto -------

_TENSORS = (7, 5)
"""ModelProto.graph, GraphProto.initializer."""

_NAME, _EXTERNAL = 8, 13
"""TensorProto.name and external_data: entries of a _KEY and a _VALUE."""

_KEY, _VALUE = 1, 2


def _spans(model: memoryview) -> list[Span]:
    """Return the span of every weight outside the graph."""
    graphs = _values(model, _TENSORS[0])
    tensors = [tensor for graph in graphs for tensor in _values(graph, _TENSORS[1])]
    return [span for tensor in tensors if (span := _span(tensor))]


def _values(message: memoryview, wanted: int) -> list[memoryview]:
    return [_message(value) for number, _, value in fields(message) if number == wanted]


def _message(value: Value) -> memoryview:
    return memoryview(b"") if isinstance(value, int) else value


def _span(tensor: memoryview) -> Span | None:
    entries = dict(_entry(entry) for entry in _values(tensor, _EXTERNAL))
    if not entries:
        return None
    (name,) = _values(tensor, _NAME)
    start = int(entries.get("offset", "0"))
    return Span(str(name, "utf-8"), start, start + int(entries["length"]))


def _entry(entry: memoryview) -> tuple[str, str]:
    (key,), (value,) = _values(entry, _KEY), _values(entry, _VALUE)
    return str(key, "utf-8"), str(value, "utf-8")


def _moved(
    message: memoryview, path: Sequence[int], starts: Sequence[int], names: Sequence[str]
) -> bytes:
    """Return `message` with the tensors at `path` in it referring to the parts that hold them."""
    if not path:
        return _moved_tensor(message, starts, names)
    made = []
    for number, kind, value in fields(message):
        if number == path[0]:
            made.append(encode(number, kind, _moved(_message(value), path[1:], starts, names)))
        else:
            made.append(encode(number, kind, value))
    return b"".join(made)


def _moved_tensor(tensor: memoryview, starts: Sequence[int], names: Sequence[str]) -> bytes:
    span = _span(tensor)
    if span is None:
        return bytes(tensor)
    part = max(i for i, start in enumerate(starts) if start <= span.start)
    entries = dict(_entry(entry) for entry in _values(tensor, _EXTERNAL))
    entries |= {"location": names[part], "offset": str(span.start - starts[part])}
    kept = (encode(*field) for field in fields(tensor) if field[0] != _EXTERNAL)
    pairs = (
        encode(_KEY, BYTES, key.encode()) + encode(_VALUE, BYTES, value.encode())
        for key, value in entries.items()
    )
    return b"".join((*kept, *(encode(_EXTERNAL, BYTES, pair) for pair in pairs)))


# ---- the data ------------------------------------------------------------------------------------


def _copy_parts(package: ModelPackage, parts: Sequence[Path], bounds: Sequence[int]) -> None:
    digest = sha256()
    with package.data_path.open("rb") as source:
        for part, start, end in zip(parts, bounds[:-1], bounds[1:], strict=True):
            with part.open("wb") as file:
                for piece in _pieces(source, end - start):
                    digest.update(piece)
                    file.write(piece)
    _check_hash(package, DATA_FILE, digest.hexdigest())


def _pieces(source: BinaryIO, left: int) -> Iterable[bytes]:
    while left and (piece := source.read(min(left, _PIECE))):
        yield piece
        left -= len(piece)


def _check_hash(package: ModelPackage, name: str, digest: str) -> None:
    if package.files[name]["sha256"] != digest:
        raise PackageError(f"{package.path} is damaged: {name} has changed since the export.")
