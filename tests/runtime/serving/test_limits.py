"""The ASGI layer around a server: what it lets through, refuses and gives up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from llama_onnx.runtime.serving.http import limits
from llama_onnx.runtime.serving.http.limits import Bounds, Limits

SMALL = Bounds(body=100, held=250, target=50, headers=200, receive=0.1, send=0.1, linger=0.1)
SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/invocations",
    "raw_path": b"/invocations",
    "query_string": b"",
    "headers": [(b"host", b"a")],
}


class Client:
    """A client that sends `parts` and then waits; `reads` False: it never reads the answer."""

    def __init__(self, parts: Iterable[bytes], *, reads: bool = True, ends: bool = True) -> None:
        self._parts, self._reads, self._ends = list(parts), reads, ends
        self.left = asyncio.Event()
        self.sent_parts = 0
        self.messages: list[Any] = []

    async def receive(self) -> Any:
        await asyncio.sleep(0)
        if self._parts:
            self.sent_parts += 1
            part = self._parts.pop(0)
            more = bool(self._parts) or not self._ends
            return {"type": "http.request", "body": part, "more_body": more}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self._reads and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        self.messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.left.set()  # as uvicorn says when the answer is complete

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> str:
        content = json.loads(self.body)
        assert content.keys() == {"error"}
        assert dict(self.messages[0]["headers"])[b"connection"] == b"close"
        assert content["error"].keys() == {"message", "type", "param", "code"}
        return str(content["error"]["message"])


class Echo:
    """Answers with the body; `calls` counts, and `ended` says how the last call ended."""

    def __init__(self, pieces: int = 1, before: Callable[[], Any] | None = None) -> None:
        self.calls, self.ended = 0, ""
        self._pieces, self._before = pieces, before

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        try:
            body = (await receive())["body"]
            if self._before is not None:
                await self._before()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(self._pieces):
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            self.ended = "whole"
        except BaseException as error:
            self.ended = type(error).__name__
            raise


def serve(app: Any, *clients: Client, bounds: Bounds = SMALL, **scope: Any) -> None:
    """Let `clients` ask at the same time."""

    async def run() -> None:
        layer = Limits(app, bounds)
        await asyncio.gather(
            *(layer({**SCOPE, **scope}, client.receive, client.send) for client in clients)
        )
        assert layer._held == 0

    asyncio.run(asyncio.wait_for(run(), 20))


def test_what_is_within_the_bounds_goes_through() -> None:
    app, client = Echo(), Client([b"a" * 40, b"", b"b" * 60])
    serve(app, client)
    assert (client.status, client.body, app.ended) == (200, b"a" * 40 + b"b" * 60, "whole")


@pytest.mark.parametrize(
    ("scope", "status", "said"),
    [
        ({"raw_path": b"/" + b"a" * 50}, 414, "the address has 51 bytes, more than 50"),
        ({"raw_path": None, "path": "/" + "ü" * 25}, 414, "the address has 51 bytes"),
        ({"query_string": b"a" * 50}, 414, "the address has 62 bytes"),
        ({"headers": [(b"a", b"b" * 100)] * 2}, 431, "the headers have 202 bytes, more than 200"),
        ({"headers": [(b"Content-Length", b"101")]}, 413, "101 bytes, more than the 100 bytes"),
        ({"headers": [(b"content-length", b"9" * 40)]}, 400, "Content-Length is not a number"),
        ({"headers": [(b"content-length", b"-1")]}, 400, "Content-Length is not a number"),
        ({"headers": [(b"content-length", "²".encode())]}, 400, "Content-Length is not a number"),
    ],
)
def test_a_head_beyond_the_bounds_is_refused_unread(
    scope: dict[str, Any], status: int, said: str
) -> None:
    app, client = Echo(), Client([b"a" * 101])
    serve(app, client, **scope)
    assert (client.status, app.calls) == (status, 0)
    assert said in client.error


def test_a_body_that_grows_too_long_is_refused_and_not_kept() -> None:
    app, client = Echo(), Client([b"a" * 50] * 1000)
    serve(app, client)
    assert (client.status, app.calls) == (413, 0)
    assert "has more than the 100 bytes" in client.error
    assert client.sent_parts == 1000  # heard out, so that the client sees the answer


def test_a_client_that_sends_for_ever_is_heard_out_for_a_while_only() -> None:
    class Endless(Client):
        async def receive(self) -> Any:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": b"a" * 50, "more_body": True}

    app, client = Echo(), Endless([])
    serve(app, client)
    assert (client.status, app.calls) == (413, 0)


def test_all_bodies_together_are_bounded() -> None:
    waiting = Client([b"a" * 90], ends=False)
    others = [Client([b"a" * 90]) for _ in range(3)]
    app = Echo(before=lambda: asyncio.sleep(0.05))
    serve(app, waiting, *others)
    assert sorted(client.status or 0 for client in others) == [200, 503, 503]
    assert waiting.status == 408


def test_a_body_that_does_not_come_is_waited_for_only_so_long() -> None:
    app, client = Echo(), Client([b"{"], ends=False)
    serve(app, client)
    assert (client.status, app.calls) == (408, 0)
    assert client.error == "the request took more than 0.1 seconds."


def test_a_client_that_does_not_read_is_given_up_and_the_next_is_served() -> None:
    app = Echo(pieces=5)
    slow, quick = Client([b"a"], reads=False), Client([b"b"])
    serve(app, slow, bounds=replace(SMALL, send=0.05))
    assert app.ended in ("OSError", "CancelledError")
    assert [message["type"] for message in slow.messages] == ["http.response.start"]
    serve(app, quick)
    assert (quick.status, quick.body) == (200, b"b" * 5)


def test_an_answer_ends_when_its_client_leaves() -> None:
    client = Client([b"a"])

    async def leave() -> None:
        client.left.set()
        await asyncio.Event().wait()

    app = Echo(before=leave)
    serve(app, client)
    assert (app.ended, client.messages) == ("CancelledError", [])


class Records(logging.Handler):
    """Keeps what is logged, also where the logger hands nothing on."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[0] is not None:
            self.errors.append(record.exc_info[0].__name__)


def test_what_the_app_raises_is_a_sentence() -> None:
    async def fail() -> None:
        raise KeyError("/opt/ml/model")

    client, records = Client([b"a"]), Records()
    limits.logger.addHandler(records)
    try:
        serve(Echo(before=fail), client)
    finally:
        limits.logger.removeHandler(records)
    assert (client.status, client.error) == (500, "the server failed: see its log.")
    assert records.errors == ["KeyError"]

    async def break_off(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("/opt/ml/model")

    client = Client([b"a"])
    serve(break_off, client)
    assert len(client.messages) == 1  # nothing more: the connection closes


def test_websockets_are_closed_and_the_start_is_passed_on() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    client = Client([])
    serve(app, client, type="websocket")
    assert client.messages == [{"type": "websocket.close", "code": 1003}]
    serve(app, client, type="lifespan")
    assert seen == ["lifespan"]


def test_the_server_stops_while_an_answer_is_made() -> None:
    app = Echo(before=lambda: asyncio.Event().wait())

    async def run() -> None:
        client = Client([b"a"])
        task = asyncio.ensure_future(Limits(app, SMALL)(SCOPE, client.receive, client.send))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)

    asyncio.run(run())
    assert app.ended == "CancelledError"
