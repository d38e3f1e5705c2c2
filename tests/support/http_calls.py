"""Plain HTTP calls to a server of this project."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit


def call(
    url: str, path: str, content: Any = None, *, key: str | None = None, seconds: float = 60
) -> tuple[int, bytes]:
    """Return status and body of a POST of `content` as JSON, or without it of a GET."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=seconds)
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    body = None if content is None else json.dumps(content).encode()
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()
