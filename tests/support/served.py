"""A real server of this project in a thread of the test, for clients of OpenAI's API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from llama_onnx.runtime.engine.engine import Limits as EngineLimits
from llama_onnx.runtime.llama.model import Llama
from llama_onnx.runtime.serving.app import Served, Settings, create_app
from llama_onnx.runtime.serving.http.api_keys import LOCAL_HOSTS, make_guard
from llama_onnx.runtime.serving.http.limits import Limits
from llama_onnx.runtime.serving.http.web_server import Protocol, address, listen


@dataclass(frozen=True)
class Running:
    """A server that listens at `url`, and what it serves."""

    url: str
    served: Served


@contextmanager
def running(
    package: Path,
    settings: Settings | None = None,
    *,
    rows: int = 8,
    api_key: str | None = None,
    add: Callable[[FastAPI], None] = lambda app: None,
) -> Iterator[Running]:
    """Serve `package` while the block runs; `add` adds routes."""
    limits = EngineLimits(cache_bytes=64 << 20, rows=rows)
    model = Llama.load(package, engine="onnxruntime", threads=1, limits=limits)
    app = create_app(model, settings)
    add(app)
    guarded: Any = Limits(app, guard=make_guard(api_key, LOCAL_HOSTS))
    config = uvicorn.Config(guarded, http=Protocol, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    opened = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        yield Running(address(opened), app.state.served)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
