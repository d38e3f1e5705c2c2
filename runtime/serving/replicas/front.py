"""The application before the replicas: takes requests, chooses a replica, and passes answers on.

It opens no model. A request that no replica has seen goes to another if one dies; one that is being
answered gets an error, because a request that ends processes must not end them all.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from llama_onnx.runtime.measure.verify import VerifyReport
from llama_onnx.runtime.serving.about import verified
from llama_onnx.runtime.serving.admission import Places
from llama_onnx.runtime.serving.endpoints import ENDPOINTS
from llama_onnx.runtime.serving.http.failure import Failure, error_event
from llama_onnx.runtime.serving.openai_errors import NotReadyError, failure_of
from llama_onnx.runtime.serving.prometheus import CONTENT_TYPE
from llama_onnx.runtime.serving.replicas.forward import (
    BrokenError,
    Header,
    Reply,
    Request,
    UnreachableError,
    asked,
)
from llama_onnx.runtime.serving.replicas.gathered_metrics import gathered
from llama_onnx.runtime.serving.replicas.keeper import Keeper
from llama_onnx.runtime.serving.replicas.pool import Pool, Replica
from llama_onnx.runtime.serving.replicas.routing import Wanted, read_wanted
from llama_onnx.targets.errors import BusyError, LlamaOnnxError

Send = Callable[[Any], Any]

BROKEN = Failure(
    502, "the replica that was answering has ended: send the request again.", "server_error"
)

_PASSED_ON = {b"accept", b"content-type", b"if-none-match"}
_OWN = {b"connection", b"content-length", b"date", b"server", b"transfer-encoding"}
_LARGE = 64 << 10
"""Bytes of a request that are read in another thread."""

_ASK_SECONDS = 5.0
"""Time for a replica's own figures."""

_EVENTS = b"text/event-stream"
_JSON = [(b"content-type", b"application/json")]
_RESPONSES = "/v1/responses"

log = logging.getLogger("llama_onnx.serve")


class Front:
    """An ASGI app over `keepers`, whose replicas want the header `key`.

    `rows` are those of each replica; `waiting` answers may wait for one. `verification` is what
    `verify` found here, for the page.
    """

    def __init__(
        self,
        keepers: Sequence[Keeper],
        key: str,
        *,
        rows: int,
        waiting: int,
        verification: VerifyReport | None = None,
    ) -> None:
        self._keepers, self._verification = keepers, verification
        self._key: Header = (b"authorization", b"Bearer " + key.encode())
        self.pool = Pool(len(keepers), rows)
        self._places = Places(rows * len(keepers), waiting)
        self._own = {
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/about": self._about,
        }

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Answer one request, or take note of the start of the server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body = (await receive())["body"]
        headers = [(name, value) for name, value in scope["headers"] if name in _PASSED_ON]
        target = scope.get("raw_path") or scope["path"].encode()
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        request = Request(scope["method"], target, [*headers, self._key], body)
        own = self._own.get(scope["path"])
        try:
            if own is not None and scope["method"] == "GET":
                response = await own(request)
                await response(scope, receive, send)
            elif scope["method"] == "POST" and scope["path"] in ENDPOINTS:
                await self._answer(request, scope["path"], send)
            else:
                await self._pass_on(request, Wanted(0), scope["path"], send)
        except LlamaOnnxError as error:
            failure, more = failure_of(error), {}
            if isinstance(error, BusyError):
                more = {"Retry-After": str(self._places.retry_after())}
            log.warning("%s %s: %d %s", scope["method"], scope["path"], failure.status, error)
            await JSONResponse(failure.to_json(), failure.status, more)(scope, receive, send)

    async def _live(self, receive: Any, send: Send) -> None:
        await receive()
        loop = asyncio.get_running_loop()

        def changed(keeper: Keeper) -> None:
            port = keeper.up.port if keeper.up is not None else None
            loop.call_soon_threadsafe(self.pool.set_port, keeper.number, port)

        for keeper in self._keepers:
            keeper.listen(changed)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for keeper in self._keepers:
            keeper.listen(lambda _: None)
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, request: Request, path: str, send: Send) -> None:
        large = len(request.body) > _LARGE
        wanted = (
            await asyncio.to_thread(read_wanted, request.body)
            if large
            else read_wanted(request.body)
        )
        with self._places.take(wanted.places):
            await self._pass_on(request, wanted, path, send)

    async def _pass_on(self, request: Request, wanted: Wanted, path: str, send: Send) -> None:
        """Let a replica answer, another one if it cannot take the request, and pass that on."""
        without: set[int] = set()
        refused: bytes | None = None
        while True:
            try:
                async with self.pool.take(wanted, without) as replica:
                    port = replica.port
                    refused = await self._try(replica, request, path, send)
            except NotReadyError:
                if not refused:
                    raise
                await _send_whole(send, 503, _JSON, refused)
                return
            if refused is None:
                return
            if refused and port is not None:
                without.add(port)

    async def _try(self, replica: Replica, request: Request, path: str, send: Send) -> bytes | None:
        """Pass on the answer of a replica; return its words if it did not take the request."""
        started = _Started(send)
        if (port := replica.port) is None:
            return b""
        try:
            async with asked(port, request) as reply:
                if reply.status == 503 and _is_not_ready(body := await reply.read()):
                    return body
                if reply.status == 503:
                    await _send_whole(started, 503, _kept(reply), body)
                elif reply.header(b"content-type").startswith(_EVENTS):
                    await started.stream(reply)
                else:
                    await _send_whole(started, reply.status, _kept(reply), await reply.read())
        except UnreachableError:
            log.warning("replica %d takes no connection", replica.number)
            self.pool.rest(replica)
            return b""
        except BrokenError:
            log.warning("replica %d ended in the middle of an answer", replica.number)
            self.pool.rest(replica)  # before its place is free for another request
            await started.fail(path)
        return None

    # The front's own endpoints

    async def _health(self, _: Request) -> Response:
        """Whether any replica answers, and how each is."""
        found = [
            {"replica": one.number, "up": one.up is not None, "restarts": one.restarts}
            for one in self._keepers
        ]
        alive = any(one.up for one in self._keepers)
        words = "ok" if alive else "no replica answers"
        return JSONResponse({"status": words, "replicas": found}, 200 if alive else 503)

    async def _ready(self, request: Request) -> Response:
        """Whether a request would be taken now: as the replica says that would take most."""
        said = await self._ask_all(request, {200, 503})
        for body, status in sorted(said.values(), key=lambda one: one[1]):
            return Response(body, status, media_type="application/json")
        return JSONResponse({"status": "no replica answers"}, 503)

    async def _metrics(self, request: Request) -> Response:
        said = await self._ask_all(request, {200})
        texts = {number: body.decode() for number, (body, _) in said.items()}
        restarts = {one.number: one.restarts for one in self._keepers}
        return Response(gathered(texts, self.pool.waiting, restarts), media_type=CONTENT_TYPE)

    async def _about(self, request: Request) -> Response:
        """Return what one replica says, with what was verified here and who runs where."""
        said = await self._ask_all(request, {200})
        if not said:
            raise NotReadyError("no replica of this server answers: try again later.")
        facts: dict[str, Any] = json.loads(next(iter(said.values()))[0])
        if self._verification is not None:
            facts["verified"] = verified(self._verification)
        facts["replicas"] = [
            {"replica": one.number, "provider": one.up and one.up.provider} for one in self._keepers
        ]
        return JSONResponse(facts)

    async def _ask_all(
        self, request: Request, statuses: Collection[int]
    ) -> Mapping[int, tuple[bytes, int]]:
        """Return by their numbers what the replicas say, as far as they do."""

        async def ask(port: int) -> tuple[bytes, int] | None:
            try:
                async with asked(port, request) as reply:
                    body = await reply.read()
            except (UnreachableError, BrokenError):
                return None
            return (body, reply.status) if reply.status in statuses else None

        there = [one for one in self._keepers if one.up is not None]
        ports = [one.up.port for one in there if one.up is not None]
        asking = (asyncio.wait_for(ask(port), _ASK_SECONDS) for port in ports)
        said = await asyncio.gather(*asking, return_exceptions=True)
        return {
            one.number: found
            for one, found in zip(there, said, strict=True)
            if found is not None and not isinstance(found, BaseException)
        }


class _Started:
    """What a client has been sent, and how its answer ends if the replica does."""

    def __init__(self, send: Send) -> None:
        self._send, self._begun, self._end = send, False, b""

    async def __call__(self, message: Any) -> None:
        self._begun = True
        await self._send(message)

    async def stream(self, reply: Reply) -> None:
        """Pass on events as they come."""
        await self(_start(reply.status, _kept(reply)))
        async for part in reply.parts():
            self._end = (self._end + part)[-2:]
            await self({"type": "http.response.body", "body": part, "more_body": True})
        await self({"type": "http.response.body", "body": b""})

    async def fail(self, path: str) -> None:
        """Tell the client that the replica has ended: an event, if it has begun to read some."""
        if not self._begun:
            body = json.dumps(BROKEN.to_json()).encode()
            await _send_whole(self._send, BROKEN.status, _JSON, body)
            return
        name, data = error_event(BROKEN, named=path == _RESPONSES)
        head = b"" if name is None else b"event: " + name.encode() + b"\n"
        # It may have ended in the middle of an event, whose end is an empty line.
        before = b"" if self._end == b"\n\n" or not self._end else b"\n\n"
        event = before + head + b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": event})


def _is_not_ready(body: bytes) -> bool:
    """Whether a replica says that it has not begun with a request, and why."""
    try:
        return bool(json.loads(body)["error"]["code"] == "not_ready")
    except (ValueError, KeyError, TypeError):
        return False


def _kept(reply: Reply) -> list[Header]:
    return [(name, value) for name, value in reply.headers if name not in _OWN]


def _start(status: int, headers: Sequence[Header]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


async def _send_whole(send: Send, status: int, headers: Sequence[Header], body: bytes) -> None:
    size = (b"content-length", str(len(body)).encode())
    await send(_start(status, [*headers, size]))
    await send({"type": "http.response.body", "body": body})
