"""uvicorn with the limits that it lacks, around an application."""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_onnx.targets.errors import UsageError, describe_reason

HEAD_SECONDS = 30.0
"""Time for the first lines of a request."""

END_SECONDS = 30
"""Time for answers in work when the server is told to end."""

MOST_CONNECTIONS = 1024
"""Open connections; more get 503."""


class Protocol(H11Protocol):
    """uvicorn's protocol, and a deadline for the first lines of a request, which it lacks."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._last: Any = None
        self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        """Close the connection unless a request has come since the last time, or is in progress."""
        if self.transport.is_closing():
            return
        if self.cycle is self._last and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self._last = self.cycle
            self.loop.call_later(HEAD_SECONDS, self._close_if_silent)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket whose connections the system closes if nobody reads for a minute.

    Raises `UsageError` for an address that cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        opened = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"cannot listen on {host}, port {port}, which another program uses: choose another "
                "--port."
            ) from None
        reason = describe_reason(error).partition(" (while attempting")[0]  # repeats the address
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}.") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
    return opened


def address(opened: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: Any, opened: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve `app` until a signal ends it, after answers in work or `END_SECONDS`.

    `ready` is called once it answers.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        server_header=False,
        log_config=None,
        access_log=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=END_SECONDS,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    _Server(config, ready).run(sockets=[opened])


def log_to_stderr(who: str = "") -> None:
    """Write what the server and the engine have to say, without colors or times of their own.

    Each line begins with the time and `who`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", "%Y-%m-%d %H:%M:%S"))
    for name in ("llama_onnx", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("llama_onnx").setLevel(logging.INFO)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # uvicorn raises them again, which would end the process as if it had been killed.
        self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
