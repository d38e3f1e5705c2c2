"""Checks what a hub answers before huggingface_hub makes file names of it.

The library joins commit hashes and ETags to the path of its cache as they come, and reads the
header of a safetensors file whatever its size. A hub, or whoever answers in its place, could so
write a file anywhere, or fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_onnx.targets.errors import CheckpointError
from llama_onnx.targets.folder_files import is_plain_name
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import JSONError, parse_json

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = re.compile(r"[0-9a-f]{32,64}")
_ETAG = re.compile(r'(W/)?"?[A-Za-z0-9_+=-]{1,200}"?')
_HEADERS = {"x-repo-commit": _COMMIT, "etag": _ETAG, "x-linked-etag": _ETAG}
_KEYS = {"sha": _COMMIT, "oid": _HASH, "sha256": _HASH, "xetHash": _HASH, "blobId": _HASH}
"""Keys of the hub's JSON whose values become names in the cache."""

_API = "/api/"
_MAX_JSON, _MAX_PART = 16 << 20, 101 << 20  # a safetensors header has at most 100 MB
_CHUNK = 1 << 16
_PART = re.compile(r"bytes=[0-9]+-[0-9]+")


@contextmanager
def checked_answers() -> Iterator[None]:
    """Check every answer to huggingface_hub inside the block; raises `CheckpointError` there."""
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _check]}
    try:
        yield
    finally:
        now = client.event_hooks
        client.event_hooks = {**now, "response": [h for h in now["response"] if h is not _check]}


def _check(response: Any) -> None:
    host = response.url.host
    for name, pattern in _HEADERS.items():
        value = response.headers.get(name)
        if value is not None and not pattern.fullmatch(value):
            raise _refusal(host, f"the {name} {shown(value)}")
    if response.request.method == "HEAD":
        return
    if _PART.fullmatch(response.request.headers.get("range", "")):
        _check_part(response)
    elif response.url.path.startswith(_API) and response.is_success:
        _check_names(_read(response), host)


def _check_part(response: Any) -> None:
    """Refuse a part of a file, which is read into memory whole, if its size is unknown or large."""
    length = response.headers.get("content-length", "")
    packed = response.headers.get("content-encoding", "identity") != "identity"
    if packed or not re.fullmatch("[0-9]{1,12}", length) or int(length) > _MAX_PART:
        raise _refusal(response.url.host, f"a part of {shown(length or 'unknown')} bytes")


def _read(response: Any) -> bytes:
    """Return the body, unpacked, of which no more is read than `_MAX_JSON`."""
    content = bytearray()
    for chunk in response.iter_bytes(_CHUNK):
        content += chunk
        if len(content) > _MAX_JSON:
            raise _refusal(response.url.host, f"JSON of more than {_MAX_JSON:,} bytes")
    whole = response._content = bytes(content)  # as `read` keeps it, which has no limit
    return whole


def _check_names(content: bytes, host: str) -> None:
    try:
        value = parse_json(content)
    except JSONError as error:
        raise _refusal(host, f"JSON that {error}") from None
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += item.values()
            _check_entry(item, host)


def _check_entry(entry: dict[str, Any], host: str) -> None:
    for key, pattern in _KEYS.items():
        value = entry.get(key)
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise _refusal(host, f"the {key} {shown(value)}")
    for key in ("path", "rfilename"):
        value = entry.get(key)
        if value is not None and not (isinstance(value, str) and is_plain_name(value)):
            raise _refusal(host, f"the file name {shown(value)}")


def _refusal(host: str, what: str) -> CheckpointError:
    return CheckpointError(f"{host} answers with {what}, which no hub does: nothing was written.")
