"""A server with the addresses that the chat page uses, and answers as the tests want them.

For what a real server does not show on demand: it is full, it breaks in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llama_onnx.runtime.serving.pages import add_page

ABOUT: dict[str, Any] = {
    "name": "Stub-1B-int4",
    "source": "example/Stub-1B",
    "commit": None,
    "precision": "int4",
    "bytes": 812_000_000,
    "provider": "cpu",
    "fallback": None,
    "context_length": 8192,
    "adapters": [],
    "distance": {
        "grade": "very close",
        "grades": [
            "indistinguishable", "very close", "close", "noticeably different", "another model"
        ],
        "figures": {
            "mean_kl": 0.0287,
            "mean_kl_error": 0.0011,
            "same_top1": 0.912,
            "perplexity_ratio": 1.0231,
            "positions": 8176,
        },
        "sentence": "Measured by the maker of the package on 8,176 positions of a text that no "
        "calibration used. This is within the limits of the recipe default.",
    },
    "verified": {
        "state": "verified",
        "sentence": "All 12 files are intact, and the package computes the certified results on "
        "this machine, with cpu.",
    },
}  # fmt: skip


@dataclass
class Script:
    """What the server does next, and the requests that it got."""

    text: str = "An answer."
    pieces: int = 4  # characters of each
    pause: float = 0.0  # seconds between pieces
    status: int = 200
    error: dict[str, Any] | str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    break_after: int | None = None  # pieces
    finish: str = "stop"
    key: str | None = None
    about: dict[str, Any] = field(default_factory=lambda: dict(ABOUT))
    models: list[str] = field(default_factory=lambda: ["Stub-1B-int4"])
    requests: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0  # answers that their reader left


def stub_app(script: Script) -> FastAPI:
    """Return the page over a server that does what `script` says."""
    app = FastAPI()
    add_page(app)

    def refused(request: Request) -> Response | None:
        if script.key and request.headers.get("authorization") != f"Bearer {script.key}":
            return JSONResponse({"error": {"message": "wrong API key."}}, 401)
        return None

    async def about(request: Request) -> Response:
        return refused(request) or JSONResponse(script.about)

    async def models(request: Request) -> Response:
        data = [{"id": name, "object": "model"} for name in script.models]
        return refused(request) or JSONResponse({"object": "list", "data": data})

    async def complete(request: Request) -> Response:
        if no := refused(request):
            return no
        script.requests.append(await request.json())
        if script.status != 200:
            return JSONResponse({"error": script.error}, script.status, script.headers)
        return StreamingResponse(_stream(script), media_type="text/event-stream")

    app.add_route("/about", about, methods=["GET"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/chat/completions", complete, methods=["POST"])
    return app


async def _stream(script: Script) -> AsyncIterator[str]:
    size, pause = script.pieces, script.pause
    pieces = [script.text[i : i + size] for i in range(0, len(script.text), size)]
    try:
        yield ": a comment, as servers send to keep a connection open\n\n"
        yield _event(choices=[{"index": 0, "delta": {"role": "assistant"}}])
        for index, piece in enumerate(pieces):
            if index == script.break_after:
                if script.error:
                    yield _event(error=script.error)
                    return
                raise OSError("the stub breaks here")
            yield _event(choices=[{"index": 0, "delta": {"content": piece}}])
            await asyncio.sleep(pause)
        yield _event(choices=[{"index": 0, "delta": {}, "finish_reason": script.finish}])
        yield _event(choices=[], usage={"prompt_tokens": 9, "completion_tokens": len(pieces)})
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        script.left += 1
        raise


def _event(**content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve `app` on a free port of this machine; yields its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(10)
