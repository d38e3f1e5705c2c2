"""The chat page: fixed files of this package, served with headers that let it load nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

FOLDER, INDEX = "page", "index.html"

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""What the page may load: only what this server has, and no script or style in its HTML."""

HEADERS = {
    # The browser keeps the files, but asks each time whether they have changed: an upgrade of this
    # package changes them under the same names.
    "cache-control": "no-cache",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page: its bytes, and the headers that it is sent with."""

    content: bytes
    headers: dict[str, str]


def read_page() -> dict[str, PageFile]:
    """Return every file of the page by its path below `page/`."""
    return dict(_read(files(__package__).joinpath(FOLDER), ""))


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its other files at `/page/...`; both need no API key.

    The routes are not part of the OpenAPI document. The files are read here, once, so no request
    names a path on the disk.
    """
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

    page = read_page()

    async def answer(request: Request) -> Response:
        found = page.get(request.path_params.get("file", INDEX))
        if found is None:
            raise HTTPException(404, "the page has no such file.")
        if found.headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=found.headers)
        return Response(found.content, headers=found.headers)

    app.add_route("/", answer, include_in_schema=False)
    app.add_route(f"/{FOLDER}/{{file:path}}", answer, include_in_schema=False)


def _read(folder: Traversable, prefix: str) -> list[tuple[str, PageFile]]:
    found: list[tuple[str, PageFile]] = []
    for entry in folder.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            found += _read(entry, f"{name}/")
        elif kind := _TYPES.get(f".{entry.name.rpartition('.')[2]}"):
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found.append((name, PageFile(content, {**HEADERS, "content-type": kind, "etag": tag})))
    return found
