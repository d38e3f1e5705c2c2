"""Who may use a server: whoever has its key; and on this machine alone, no page of a stranger."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection
from typing import Any

from llama_onnx.runtime.serving.http.failure import Failure, failure_of_status

_OPEN = ("/health", "/ready", "/")
"""Paths that need no key: they say nothing of the model."""

_PAGE = "/page/"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Addresses that only this machine reaches."""

LOCAL_HOSTS = frozenset(f"[{host}]" if ":" in host else host for host in LOOPBACK)
"""The same as they are in the header Host."""

_JSON = "application/json"


def make_guard(
    api_key: str | None, hosts: Collection[str] | None
) -> Callable[[Any], Failure | None]:
    """Return what checks the head of a request, and returns why it is refused.

    `hosts` are the names by which a client may call the server, None for any. With `LOCAL_HOSTS`, a
    page whose own name was made to point here is refused (DNS rebinding).
    """
    expected = None if api_key is None else api_key.encode()

    def check(scope: Any) -> Failure | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if hosts is not None and _host(headers.get(b"host", b"")) not in hosts:
            return failure_of_status(403, "this server answers to its own name only: localhost.")
        path = scope["path"]
        if expected is not None and path not in _OPEN and not path.startswith(_PAGE):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), expected)
            if scheme.lower() != b"bearer" or not right:
                return failure_of_status(
                    401, "the API key is missing or wrong: send it as Authorization: Bearer KEY."
                )
        # A page of a stranger can send a form or plain text here, but not JSON.
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
        if scope["method"] == "POST" and kind != _JSON:
            return failure_of_status(415, f"the request must have the content type {_JSON}.")
        return None

    return check


def _host(header: bytes) -> str:
    """Return the name in a Host header, without the port."""
    text = header.decode("latin-1").lower()
    if text.startswith("["):
        return text[: text.find("]") + 1]
    return text.partition(":")[0]
