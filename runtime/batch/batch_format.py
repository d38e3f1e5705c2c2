"""A line of a batch: what it asks, and the line of the output that answers it.

Lines are requests of OpenAI's batch format, or plain: the fields of a request by themselves. All
answers have OpenAI's format.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_onnx.runtime.serving.endpoints import CHAT_PATH, COMPLETION_PATH, ENDPOINTS
from llama_onnx.runtime.serving.http.failure import Failure
from llama_onnx.runtime.serving.http.limits import MAX_BODY
from llama_onnx.targets.printable import shown
from llama_onnx.targets.strict_json import JSONError, parse_json

_WRAPPED = frozenset({"method", "url", "body"})
_KEYS = _WRAPPED | {"custom_id"}


class LineError(Exception):
    """A line that is not a request: `code` is one of OpenAI's for a batch."""

    def __init__(self, code: str, text: str, custom_id: str | None = None) -> None:
        super().__init__(text)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True)
class Request:
    """What a line asks of the endpoint `path`."""

    custom_id: str | None
    path: str
    body: Mapping[str, Any]


def read_line(text: bytes) -> Request:
    """Read a line; raise `LineError` for one that is not a request."""
    if len(text) > MAX_BODY:
        raise LineError("invalid_json_line", f"the line has more than {MAX_BODY:,} bytes.")
    try:
        content = parse_json(text, unique=True)
    except JSONError as error:
        reason = str(error).replace("(line 1: ", "(")  # of the text parsed, not of the file
        raise LineError("invalid_json_line", f"the line {reason}.") from None
    if not isinstance(content, dict):
        raise LineError("invalid_json_line", "the line is not a JSON object.")
    custom_id = content.get("custom_id")
    if custom_id is not None and not isinstance(custom_id, str):
        raise LineError("invalid_request", "custom_id must be a text.")
    if not _WRAPPED & content.keys():
        return _plain(content, custom_id)
    if custom_id is None:
        raise LineError("missing_required_parameter", "the line has no custom_id.")
    if unknown := sorted(content.keys() - _KEYS):
        text_ = f"the line has an unknown field, {shown(unknown[0])}."
        raise LineError("unknown_parameter", text_, custom_id)
    if content.get("method") != "POST":
        raise LineError("invalid_method", 'method must be "POST".', custom_id)
    url = content.get("url")
    if not isinstance(url, str) or url not in ENDPOINTS:
        known = ", ".join(ENDPOINTS)
        raise LineError("invalid_url", f"url must be one of {known}, not {shown(url)}.", custom_id)
    if not isinstance(body := content.get("body"), dict):
        raise LineError("missing_required_parameter", "body must be an object.", custom_id)
    return Request(custom_id, url, body)


def custom_id_of(text: bytes) -> str | None:
    """Return the custom_id of a line, None if it has none that can be read."""
    try:
        return read_line(text).custom_id
    except LineError as error:
        return error.custom_id


def _plain(content: Mapping[str, Any], custom_id: str | None) -> Request:
    given = [name for name in ("messages", "prompt") if content.get(name) is not None]
    if len(given) != 1:
        raise LineError(
            "missing_required_parameter",
            "the line needs either messages or prompt, or OpenAI's custom_id, method, url and "
            "body.",
            custom_id,
        )
    body = {name: value for name, value in content.items() if name != "custom_id"}
    return Request(custom_id, CHAT_PATH if given == ["messages"] else COMPLETION_PATH, body)


@dataclass(frozen=True)
class AnsweredLine:
    """The line of the output that answers a line of the input, and what it took."""

    output: bytes
    prompt_tokens: int = 0
    new_tokens: int = 0
    failed: bool = False

    def to_bytes(self) -> bytes:
        """Return everything as one line without its end."""
        return b"%d %d %d %b" % (self.failed, self.prompt_tokens, self.new_tokens, self.output)

    @classmethod
    def from_bytes(cls, content: bytes) -> AnsweredLine:
        """Read what `to_bytes` returned."""
        failed, prompt, new, output = content.split(b" ", 3)
        return cls(output, int(prompt), int(new), failed == b"1")


def response_line(custom_id: str | None, status: int, body: bytes) -> bytes:
    """Return the output for a request that got a response, `body` as JSON."""
    response = b'{"status_code": %d, "request_id": "req_%b", "body": %b}' % (
        status,
        secrets.token_hex(12).encode(),
        body,
    )
    return _line(custom_id, response, b"null")


def refused(custom_id: str | None, failure: Failure) -> AnsweredLine:
    """Return the answer to a request that the model did not take."""
    body = json.dumps(failure.to_json()).encode()
    return AnsweredLine(response_line(custom_id, failure.status, body), failed=True)


def not_asked(custom_id: str | None, code: str, text: str) -> AnsweredLine:
    """Return the answer to a line that never became a request, or whose request got lost."""
    error = json.dumps({"code": code, "message": text}).encode()
    return AnsweredLine(_line(custom_id, b"null", error), failed=True)


def _line(custom_id: str | None, response: bytes, error: bytes) -> bytes:
    return b'{"id": "batch_req_%b", "custom_id": %b, "response": %b, "error": %b}' % (
        secrets.token_hex(12).encode(),
        json.dumps(custom_id).encode(),
        response,
        error,
    )
