"""Failures as OpenAI's API has them: a status, and `{"error": {"message", "type", ...}}`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """What a client is told: the HTTP status, and the fields of OpenAI's error object."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }


def failure_of_status(status: int, text: str) -> Failure:
    """Return the failure for a status that the web server chose itself."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if status == 401:
        return Failure(status, text, kind, None, "invalid_api_key")
    if status == 429:
        return Failure(status, text, "rate_limit_error", None, "rate_limit_exceeded")
    return Failure(status, text, kind)


def error_event(failure: Failure, *, named: bool) -> tuple[str | None, bytes]:
    """Return name and data of the event that tells a failure in the middle of a stream.

    `named`: of the endpoint /v1/responses, whose events have names, and no object `error`.
    """
    content = failure.to_json()
    if named:
        content = {**content["error"], "type": "error", "sequence_number": 0}
    return ("error" if named else None), json.dumps(content).encode()
