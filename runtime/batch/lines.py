"""The lines of a file of requests, JSON lines or Parquet, in pieces that workers read alone.

A line's number is its place among the lines that are not blank, or its row, from 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llama_onnx.runtime.serving.http.limits import MAX_BODY
from llama_onnx.targets.errors import UsageError, describe_reason
from llama_onnx.targets.extras import missing_extra
from llama_onnx.targets.listing import hash_file
from llama_onnx.targets.strict_json import parse_json

PIECE = 32
"""Lines of a piece of JSON lines."""

ROWS = 512
"""Rows of a piece of Parquet, at most: whoever reads one reads its row group up to there."""

_BLOCK = 1 << 20

Line = tuple[int, bytes]


@dataclass(frozen=True)
class Piece:
    """Some lines of the file `path` that follow one another: `count` from number `first` on.

    `start` and `end` are where they are: bytes, or the row group and the first row in it.
    """

    path: str
    first: int
    count: int
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A file of requests: its `sha256`, how many lines it has, and its pieces in order."""

    path: Path
    sha256: str
    count: int
    pieces: tuple[Piece, ...]

    def read(self, done: bytes | bytearray) -> Iterator[Line]:
        """Yield the lines that are not `done`, which has a byte for each, 0 or 1."""
        for piece in unfinished(self.pieces, done):
            for number, text in read_piece(piece):
                if not done[number]:
                    yield number, text


def unfinished(pieces: tuple[Piece, ...], done: bytes | bytearray) -> Iterator[Piece]:
    """Yield the pieces that have a line that is not `done`."""
    for piece in pieces:
        if done.find(0, piece.first, piece.first + piece.count) >= 0:
            yield piece


def open_source(path: Path) -> Source:
    """Read the whole file once, to count its lines and to know it again.

    Raises `UsageError` for a file without lines or that cannot be read.
    """
    try:
        source = _of_parquet(path) if is_parquet(path) else _of_json_lines(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {describe_reason(error)}.") from None
    if not source.count:
        raise UsageError(f"{path} has no lines: write one request in each, as JSON.")
    return source


def is_parquet(path: Path) -> bool:
    """Whether the name says that a file is Parquet."""
    return path.suffix.lower() in (".parquet", ".pq")


def read_piece(piece: Piece) -> Iterator[Line]:
    """Yield the number and the text of each line.

    Of a line that no request may have, only the beginning, which is still too long.
    """
    path = Path(piece.path)
    texts = _rows(path, piece) if is_parquet(path) else _texts(path, piece)
    yield from enumerate(texts, piece.first)


def _of_json_lines(path: Path) -> Source:
    digest, starts, count, at = hashlib.sha256(), [], 0, 0
    with path.open("rb") as file:
        for text, length in _split(file, digest.update):
            if text.strip():
                if count % PIECE == 0:
                    starts.append(at)
                count += 1
            at += length
    ends = [*starts[1:], at][: len(starts)]
    pieces = tuple(
        Piece(str(path), first, min(PIECE, count - first), start, end)
        for first, start, end in zip(range(0, count, PIECE), starts, ends, strict=True)
    )
    return Source(path, digest.hexdigest(), count, pieces)


def _split(file: BinaryIO, seen: Any = lambda _: None) -> Iterator[tuple[bytes, int]]:
    """Yield each line's beginning, of at most one byte more than a request may have, and its whole
    length: no line, however long, is in memory."""
    while block := file.readline(_BLOCK):
        seen(block)
        text, length = block, len(block)
        while not block.endswith(b"\n") and (block := file.readline(_BLOCK)):
            seen(block)
            length += len(block)
            if len(text) <= MAX_BODY:
                text += block[: MAX_BODY + 1 - len(text)]
        yield text, length


def _texts(path: Path, piece: Piece) -> Iterator[bytes]:
    at = piece.start
    with path.open("rb") as file:
        file.seek(at)
        for text, length in _split(file):
            if at >= piece.end:
                return
            at += length
            if text.strip():
                yield text


def _of_parquet(path: Path) -> Source:
    groups = _open_parquet(path).metadata
    pieces, first = [], 0
    for group in range(groups.num_row_groups):
        rows = groups.row_group(group).num_rows
        for start in range(0, rows, ROWS):
            pieces.append(Piece(str(path), first + start, min(ROWS, rows - start), group, start))
        first += rows
    return Source(path, hash_file(path), first, tuple(pieces))


def _open_parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise missing_extra("reading Parquet", error.name, "cpu,ray") from None
    try:
        return parquet.ParquetFile(path)
    except ArrowException as error:
        raise UsageError(f"{path} is not a Parquet file: {describe_reason(error)}.") from None


def _rows(path: Path, piece: Piece) -> Iterator[bytes]:
    from pyarrow import ArrowException

    try:
        yield from map(row_text, _rows_as_python(path, piece))
    except (ArrowException, ValueError, OverflowError) as error:
        # Damage, a text that is not UTF-8, a date after 9999.
        raise UsageError(
            f"{path} has values that cannot be read: {describe_reason(error)}. Columns that are "
            "not fields of a request may be left out."
        ) from None


def _rows_as_python(path: Path, piece: Piece) -> Iterator[dict[str, Any]]:
    at, end = 0, piece.end + piece.count
    for batch in _open_parquet(path).iter_batches(batch_size=ROWS, row_groups=[piece.start]):
        first, stop = max(at, piece.end), min(at + batch.num_rows, end)
        if first < stop:
            yield from batch.slice(first - at, stop - first).to_pylist()
        at += batch.num_rows
        if at >= end:
            return


def row_text(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON: without nulls, which stand for what a row does not have, and
    with the JSON in a text `body` or `messages` in its place.

    >>> row_text({"custom_id": "a", "body": '{"prompt": "the fox"}', "url": None})
    b'{"custom_id": "a", "body": {"prompt": "the fox"}}'
    """
    content = _without_nulls(row)
    for name in ("body", "messages"):
        if isinstance(text := content.get(name), str):
            with suppress(ValueError):  # left as it is, for the answer to say what is wrong
                content[name] = parse_json(text.encode())
    return json.dumps(content, ensure_ascii=False, default=repr).encode("utf-8", "surrogatepass")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
