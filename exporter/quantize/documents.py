"""Reads a file to calibrate on: plain text, or JSON Lines of conversations, texts or token ids."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_onnx.runtime.llama.conversation import check_messages
from llama_onnx.targets.errors import UsageError, describe_reason
from llama_onnx.targets.strict_json import JSONError, parse_json

JSON_LINES = (".jsonl", ".ndjson", ".json")
"""How the name of a file ends that is not read as one plain text."""

MAX_BYTES = 64 << 20
"""Largest file. A calibration reads some thousand tokens, which is less than a thousandth of it."""

_FORMS = '{"messages": [...]}, [...], {"text": "..."} or {"ids": [...]}'
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Document:
    """A text, a conversation or token ids: one of the three. `where` names file and line."""

    where: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Documents:
    """What a file holds, in its order, and the sha256 of the file. `plain`: one plain text."""

    documents: tuple[Document, ...]
    sha256: str
    plain: bool


def read_documents(path: Path) -> Documents:
    """Read the file at `path`: JSON Lines if its name ends like one of `JSON_LINES`, else one text.

    Raises `UsageError` for a file that cannot be read, is too large, is not UTF-8 (the message says
    where), is empty, or has a line that is none of the known forms.
    """
    content = _content(path)
    text = _decoded(content, path)
    # As Python's text mode reads lines: a file from Windows gives the same tokens.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UsageError(f"{path} is empty: calibrate on a file with text.")
    plain = path.suffix.lower() not in JSON_LINES
    documents = (Document(str(path), text=text),) if plain else tuple(_lines(text, path))
    return Documents(documents, hashlib.sha256(content).hexdigest(), plain)


def check_text_file(path: Path) -> None:
    """Raise `UsageError` unless `path` is a regular file that can be read; reads nothing of it."""
    if path.exists() and not path.is_file():  # opening a FIFO would wait for ever
        raise UsageError(f"{path} is not a regular file: calibrate on a text file.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {describe_reason(error)}.") from None


def _content(path: Path) -> bytes:
    check_text_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {describe_reason(error)}.") from None
    if len(content) > MAX_BYTES:
        raise UsageError(
            f"{path} has more than {MAX_BYTES >> 20} MiB, and a calibration needs less than one: "
            "cut a part out of it."
        )
    return content


def _decoded(content: bytes, path: Path) -> str:
    if content.startswith(_UTF16):
        raise UsageError(f"{path} is UTF-16 text: convert it to UTF-8 first.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + 3 * content.startswith(codecs.BOM_UTF8)
        line = content.count(b"\n", 0, start) + 1
        raise UsageError(
            f"{path} is not UTF-8 text: byte {start:,}, in line {line:,}, is "
            f"0x{content[start]:02x}: convert it first."
        ) from None


def _lines(text: str, path: Path) -> Iterator[Document]:
    # Not `splitlines`, which also splits at the separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _document(line, f"{path} line {number:,}")


def _document(line: str, where: str) -> Document:
    try:
        value = parse_json(line.encode("utf-8"))
    except JSONError as error:
        reason = "is not JSON" if "valid JSON" in str(error) else str(error)
        raise UsageError(f"{where} {reason}: each line must be {_FORMS}.") from None
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    elif isinstance(value, dict) and isinstance(value.get("text"), str):
        return Document(where, text=value["text"])
    elif isinstance(value, dict) and _are_ids(value.get("ids")):
        return Document(where, ids=tuple(value["ids"]))
    if not isinstance(value, list):
        raise UsageError(f"{where} has no conversation and no text: each line must be {_FORMS}.")
    return Document(where, messages=tuple(check_messages(value, f"{where}: messages")))


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
