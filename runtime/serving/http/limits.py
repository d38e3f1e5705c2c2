"""What a server takes from a stranger: one ASGI layer around any app.

No request costs more than a bounded amount of memory and time, whoever sends it: the layer reads
the body itself, up to a limit and a deadline, and gives up clients that do not read what they asked
for. Needs only the standard library.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from llama_onnx.runtime.serving.http.failure import Failure, failure_of_status

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

Guard = Callable[[Any], "Failure | None"]

MAX_BODY = 4 << 20
"""Most bytes of a request: enough for any text that fits a context of 131,072 tokens."""

BUSY = "too many requests are waiting: try again later."

logger = logging.getLogger("uvicorn.error")


def too_large(size: int | None, most: int) -> str:
    """Return the sentence about a request of `size` bytes, None if that is not known."""
    has = "more" if size is None else f"{size:,} bytes, more"
    return f"the request has {has} than the {most:,} bytes that this server reads: shorten it."


@dataclass(frozen=True)
class Bounds:
    """The limits, in bytes and seconds.

    `held` is for the bodies of all requests together. A refused client may go on sending for
    `linger` seconds, unheard: if the connection closed at once, it would not see the answer.
    """

    body: int = MAX_BODY
    held: int = 16 * MAX_BODY
    target: int = 8 << 10
    headers: int = 32 << 10
    receive: float = 30
    send: float = 30
    linger: float = 5


class RefusedError(Exception):
    """A request that gets a status and a sentence instead of the app."""

    def __init__(self, status: int, text: str, *, linger: bool = False) -> None:
        super().__init__(text)
        self.failure, self.linger = failure_of_status(status, text), linger


class Limits:
    """An ASGI app that lets through to `app` only what is within `bounds`, and what `guard` passes:
    it gets the head of each request."""

    def __init__(
        self, app: App, bounds: Bounds | None = None, guard: Guard = lambda scope: None
    ) -> None:
        self._app, self._bounds, self._guard = app, bounds or Bounds(), guard
        self._held = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on the start and end of the server."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        body = _Body()
        try:
            check_head(scope, self._bounds)
            if failure := self._guard(scope):
                raise RefusedError(failure.status, failure.message, linger=True)
            await asyncio.wait_for(self._read(body, receive), self._bounds.receive)
            await self._run(scope, body, receive, send)
        except RefusedError as refused:
            logger.warning("refused: %s", refused)
            await self._refuse(refused, receive, send)
        except asyncio.TimeoutError:
            late = RefusedError(
                408, f"the request took more than {self._bounds.receive:g} seconds."
            )
            await self._refuse(late, receive, send)
        except _GoneError:
            logger.warning("a client left before its answer was complete")
        finally:
            self._held -= body.size

    async def _read(self, body: _Body, receive: Receive) -> None:
        """Read the body, which counts as held until the request is over."""
        most, more = self._bounds.body, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            part = message.get("body", b"")
            if body.size + len(part) > most:
                raise RefusedError(413, too_large(None, most), linger=True)
            if self._held + len(part) > self._bounds.held:
                raise RefusedError(503, BUSY, linger=True)
            self._held += len(part)
            body.add(part)
            more = message.get("more_body", False)

    async def _run(self, scope: Any, body: _Body, receive: Receive, send: Send) -> None:
        """Run the app, and cancel it when the client leaves or does not read."""
        exchange = _Exchange(body, send, self._bounds)
        answering = asyncio.ensure_future(self._app(scope, exchange.receive, exchange.send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            # A server also says so when the answer is complete.
            if not answering.done() and not exchange.complete:
                exchange.gone.set()
                answering.cancel()
            await answering
        except (Exception, asyncio.CancelledError) as error:
            await self._after_failure(error, exchange, answering)
        finally:
            leaving.cancel()

    async def _after_failure(
        self, error: BaseException, exchange: _Exchange, answering: asyncio.Future[None]
    ) -> None:
        if exchange.gone.is_set():
            raise _GoneError from None
        if isinstance(error, asyncio.CancelledError):  # the server is shutting down
            answering.cancel()
            raise error
        logger.error("the app failed", exc_info=error)
        if exchange.started:
            raise _GoneError from None  # the connection closes with the answer incomplete
        raise RefusedError(500, "the server failed: see its log.") from None

    async def _refuse(self, refused: RefusedError, receive: Receive, send: Send) -> None:
        content = json.dumps(refused.failure.to_json()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
        ]
        status = refused.failure.status
        start = {"type": "http.response.start", "status": status, "headers": headers}
        try:
            await send(start)
            await send({"type": "http.response.body", "body": content, "more_body": True})
            if refused.linger:
                await asyncio.wait_for(_discard(receive), self._bounds.linger)
        except (OSError, asyncio.TimeoutError):
            pass
        await send({"type": "http.response.body", "body": b""})


class _GoneError(Exception):
    """The client has left, or counts as having left."""


class _Body:
    """The parts of a body, until the app takes them, and their size."""

    def __init__(self) -> None:
        self._parts: list[bytes] | None = []
        self.size = 0

    def add(self, part: bytes) -> None:
        assert self._parts is not None, "the body is complete"
        self._parts.append(part)
        self.size += len(part)

    def take(self) -> bytes | None:
        """Return the whole body the first time, then None."""
        parts, self._parts = self._parts, None
        return None if parts is None else b"".join(parts)


class _Exchange:
    """What the app receives and sends: a body that is complete, and a client that must read."""

    def __init__(self, body: _Body, send: Send, bounds: Bounds) -> None:
        self._body, self._send, self._bounds = body, send, bounds
        self.gone = asyncio.Event()
        self.started = self.complete = False

    async def receive(self) -> Message:
        if (body := self._body.take()) is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.started = True
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body", False)
        try:
            await asyncio.wait_for(self._send(message), self._bounds.send)
        except asyncio.TimeoutError:
            logger.warning("a client did not read for %g seconds", self._bounds.send)
            self.gone.set()
            raise OSError("the client does not read its answer") from None


def check_head(scope: Any, bounds: Bounds) -> None:
    """Raise `RefusedError` for a request whose first lines say that it is beyond the bounds."""
    target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    if target > bounds.target:
        raise RefusedError(414, f"the address has {target:,} bytes, more than {bounds.target:,}.")
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if size > bounds.headers:
        raise RefusedError(431, f"the headers have {size:,} bytes, more than {bounds.headers:,}.")
    for name, value in scope["headers"]:
        if name.lower() != b"content-length":
            continue
        if not value.isdigit() or len(value) > 20:
            raise RefusedError(400, "the header Content-Length is not a number.")
        if int(value) > bounds.body:
            raise RefusedError(413, too_large(int(value), bounds.body), linger=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _discard(receive: Receive) -> None:
    """Read the rest of a body and keep nothing."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
