"""A package's graph and weights as transformers.js wants them: parts of the data below 2 GB.

The weights are copied once, in pieces; the graph is rewritten without loading them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llama_onnx.targets.errors import PackageError
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.package import DATA_FILE, MODEL_FILE, ModelPackage

if TYPE_CHECKING:
    import onnx

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
    model = _read_graph(package)
    size = package.data_path.stat().st_size
    try:
        starts = cut((_span(tensor) for tensor in _outside(model)), size, limit)
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
    for tensor in _outside(model):
        _move(tensor, starts, names)
    (folder / name).write_bytes(model.SerializeToString())
    _copy_parts(package, [folder / part for part in names], [*starts, size])
    return len(names)


def read_listed(package: ModelPackage, name: str) -> bytes:
    """Return the content of a small file of `package`. Raises `PackageError` if it differs from
    the manifest."""
    content = (package.path / name).read_bytes()
    _check_hash(package, name, sha256(content).hexdigest())
    return content


def _read_graph(package: ModelPackage) -> onnx.ModelProto:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise missing_extra("a bundle for the web", error.name, "export,cpu") from None
    return onnx.load_model_from_string(read_listed(package, MODEL_FILE))


def _outside(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in model.graph.initializer if tensor.external_data]


def _span(tensor: onnx.TensorProto) -> Span:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    start = int(entries.get("offset", 0))
    return Span(tensor.name, start, start + int(entries["length"]))


def _move(tensor: onnx.TensorProto, starts: Sequence[int], names: Sequence[str]) -> None:
    """Let `tensor` refer to the part that holds it."""
    begin = _span(tensor).start
    part = max(i for i, start in enumerate(starts) if start <= begin)
    values = {"location": names[part], "offset": str(begin - starts[part])}
    for entry in tensor.external_data:
        entry.value = values.get(entry.key, entry.value)


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
