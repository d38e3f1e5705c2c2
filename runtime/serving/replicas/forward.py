"""Ask a replica over HTTP: one connection for each request, closed when the asker leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11

Header = tuple[bytes, bytes]

_READ = 64 << 10


class UnreachableError(Exception):
    """A replica that took no connection: it has not seen the request."""


class BrokenError(Exception):
    """A replica that ended in the middle of a request."""


@dataclass(frozen=True)
class Request:
    """A request to a replica; `target` is path and query."""

    method: str
    target: bytes
    headers: Sequence[Header] = ()
    body: bytes = b""


class Reply:
    """The head of a response, and its body as it comes."""

    def __init__(self, exchange: _Exchange, head: h11.Response) -> None:
        self.status = int(head.status_code)
        self.headers: list[Header] = [(name, value) for name, value in head.headers]
        self._exchange = exchange

    def header(self, name: bytes) -> bytes:
        """Return the value of a header, empty without it."""
        return next((value for key, value in self.headers if key == name), b"")

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the body in parts; raise `BrokenError` if it ends early."""
        while isinstance(event := await self._exchange.next(), h11.Data):
            yield bytes(event.data)

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([part async for part in self.parts()])


@asynccontextmanager
async def asked(port: int, request: Request) -> AsyncIterator[Reply]:
    """Yield the reply to `request`; the replica is left alone after the block, whatever happens.

    Raises `UnreachableError` or `BrokenError`.
    """
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as error:
        raise UnreachableError from error
    try:
        exchange = _Exchange(reader, writer)
        await exchange.send(request)
        head = await exchange.next()
        if not isinstance(head, h11.Response):
            raise BrokenError
        yield Reply(exchange, head)
    finally:
        writer.transport.abort()  # it need not wait for what is still to be read


class _Exchange:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._h11 = h11.Connection(h11.CLIENT)

    async def send(self, request: Request) -> None:
        head = h11.Request(
            method=request.method,
            target=request.target,
            headers=[
                (b"host", b"replica"),
                (b"connection", b"close"),
                (b"content-length", str(len(request.body)).encode()),
                *request.headers,
            ],
        )
        events = [head, h11.Data(data=request.body), h11.EndOfMessage()]
        try:
            self._writer.write(b"".join(self._h11.send(event) or b"" for event in events))
            await self._writer.drain()
        except OSError as error:
            raise BrokenError from error

    async def next(self) -> Any:
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                self._h11.receive_data(await self._reader.read(_READ))
        except (OSError, h11.RemoteProtocolError) as error:
            raise BrokenError from error
        if isinstance(event, h11.ConnectionClosed):
            raise BrokenError
        return event
